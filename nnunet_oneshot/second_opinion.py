"""One more opinion of a round's labels: SAM2 in `self` mode, prompted by what the model predicts.

The model says where a structure is, SAM2 where its edges are. What it says of round N is kept as views of the source
`self_NN`, like those of any propagator, so that an interrupted round goes on from whole cases.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from nnunet_oneshot.dataset import Case, RawDataset
from nnunet_oneshot.prompting import PredictedLabels
from nnunet_oneshot.propagate import Job, carry
from nnunet_oneshot.propagators import PropagatorOptions, self_prompted
from nnunet_oneshot.refine_record import Plan, Record, begun_plan
from nnunet_oneshot.store import Store
from sam2_propagation.checkpoints import load_checkpoint
from sam2_propagation.views import EVERY_PLANE

_PREFIX = "self_"
_REPEATED = ("window", "channels")
"""Options of round 0's SAM2 that hold for an opinion too: what it sees of an image."""
_NOT_REPEATED = ("config", "adapt")
"""Those that an opinion would not have: weights that were other ones are not asked again unless told to."""
AS_BEFORE = "auto"
"""Ask the weights that labelled the images along three planes: prompted by a model they bettered its labels on phantoms
and on hippocampus (benchmarks/opinion.py); along one plane they did not."""


def source_of(number: int) -> str:
    """The source's name of round `number`."""
    return f"{_PREFIX}{number:02d}"


def opinion_of(store: Store, asked: str | None) -> str | None:
    """The weights that give an opinion; None for none. "auto" stays what it was in a refinement that has trained."""
    if asked != AS_BEFORE:
        return asked
    if (begun := _trained_plan(store)) is not None:
        return begun.self_opinion
    settings = store.read_manifest().settings
    return settings.get("checkpoint", "builtin") if _along_planes(store) and not _unrepeated(store) else None


def why_none(store: Store, asked: str | None) -> list[str]:
    """In words, why "auto" asks for no opinion though SAM2 labelled the images along three planes, if so.

    Nothing once a refinement has begun: it was said then.
    """
    flags = {"config": "-sam2_cfg", "adapt": "-adapt"}
    if asked != AS_BEFORE or begun_plan(store.folder) is not None or not _along_planes(store):
        return []
    given = " and ".join(flags[key] for key in _unrepeated(store))
    if not given:
        return []
    return [f"SAM2 is not asked again in rounds, since {given} is not repeated; -self_opinion builtin asks it without"]


def _trained_plan(store: Store) -> Plan | None:
    """What a refinement goes on with; one that was begun and never trained to an end gives way."""
    begun = begun_plan(store.folder)
    return begun if begun is not None and Record(store).is_trained() else None


def _along_planes(store: Store) -> bool:
    return tuple(store.read_manifest().settings.get("views", {}).get("sam2", ())) == EVERY_PLANE


def _unrepeated(store: Store) -> list[str]:
    settings = store.read_manifest().settings
    return [key for key in _NOT_REPEATED if key in settings]


def check_sam2(checkpoint: str, device: str) -> None:
    """PropagationError where the weights or the device cannot be had: better before hours of training than after."""
    load_checkpoint(checkpoint, device=device)


def ask_sam2(
    dataset: RawDataset,
    store: Store,
    cases: Sequence[Case],
    predictions: Path,
    number: int,
    checkpoint: str,
    device: str,
    processes: int,
) -> str:
    """Let SAM2 label the cases, prompted by their predictions; cases that are done are kept.

    It sees of an image what it saw when it labelled them. Cases in which the model predicts nothing are not asked
    about: with nothing to prompt it, it would look for what the annotated images show.

    Args:
        predictions: folder with one predicted label a case.
        number: the round that is made.
        checkpoint: SAM2 weights, as for `propagate`.

    Returns:
        The source's name.

    Raises:
        PropagationError: weights or a device that cannot be had.
    """
    settings = store.read_manifest().settings
    seen = {key: settings[key] for key in _REPEATED if key in settings}
    prompter = PredictedLabels(dataset, predictions)
    propagator = self_prompted(PropagatorOptions(device, checkpoint, **seen), prompter)
    propagator.name = source_of(number)
    views = propagator.fitting_views([dataset.support(case) for case in dataset.annotated])
    asked = [case for case in cases if prompter.shows_anything(case.name)]
    carry(Job(dataset, store, propagator, views), asked, processes)
    return propagator.name


def forget_opinions(store: Store, number: int) -> None:
    """Remove what was said of rounds after `number`, the records first: without them nothing counts as done."""
    for parent in (store.state_folder / "cases", store.folder / "pseudoTr"):
        for folder in sorted(parent.glob(f"{_PREFIX}[0-9][0-9]")):
            if int(folder.name.removeprefix(_PREFIX)) > number:
                shutil.rmtree(folder)
