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
from nnunet_oneshot.propagators import self_prompted
from nnunet_oneshot.refine_record import begun_plan
from nnunet_oneshot.store import Store
from sam2_propagation.checkpoints import load_checkpoint
from sam2_propagation.sam2 import PLANES

_PREFIX = "self_"
_NOT_REPEATED = {"config", "window", "channels", "adapt"}
"""Options of round 0's SAM2 that an opinion would not have: what looked otherwise is not asked again unless told to."""
AS_BEFORE = "auto"
"""Ask the weights that labelled the images along three planes: prompted by a model they bettered its labels on phantoms
and on hippocampus (benchmarks/opinion.py); along one plane they did not."""


def source_of(number: int) -> str:
    """The source's name of round `number`."""
    return f"{_PREFIX}{number:02d}"


def opinion_of(store: Store, asked: str | None) -> str | None:
    """The weights that give an opinion; None for none. "auto" stays what it was in a refinement that has begun."""
    if asked != AS_BEFORE:
        return asked
    if (begun := begun_plan(store.folder)) is not None:
        return begun.self_opinion
    settings = store.read_manifest().settings
    planes = tuple(settings.get("views", {}).get("sam2", ())) == PLANES
    return settings.get("checkpoint", "builtin") if planes and not _NOT_REPEATED & set(settings) else None


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

    Args:
        predictions: folder with one predicted label a case.
        number: the round that is made.
        checkpoint: SAM2 weights, as for `propagate`.

    Returns:
        The source's name.

    Raises:
        PropagationError: weights or a device that cannot be had.
    """
    propagator = self_prompted(checkpoint, device, PredictedLabels(dataset, predictions))
    propagator.name = source_of(number)
    views = propagator.fitting_views([dataset.support(case) for case in dataset.annotated])
    carry(Job(dataset, store, propagator, views), cases, processes)
    return propagator.name


def forget_opinions(store: Store, number: int) -> None:
    """Remove what was said of rounds after `number`, the records first: without them nothing counts as done."""
    for parent in (store.state_folder / "cases", store.folder / "pseudoTr"):
        for folder in sorted(parent.glob(f"{_PREFIX}[0-9][0-9]")):
            if int(folder.name.removeprefix(_PREFIX)) > number:
                shutil.rmtree(folder)
