"""One annotated slice in every volume: what carries it best to the rest of its volume?

    python benchmarks/oneseg.py [--sets chaos_mr_t2 acdc_mr hippocampus] [--cases 8] [--methods ...] [--suggested]
                                [--trained_on SET] [--inverted] [--plain]

Data: $ONESHOT_DATA, or ../shared/data beside the repository. Of each pool case (a subset at even distances in the
sorted names) one slice across the thickest axis is annotated: the one with the largest foreground area, or with
`--suggested` the one that `suggest` names, which sees no label. The other slices' labels are read for scoring only.
Correspondence is trained once a set on ALL its pool images without labels, or out of distribution: `--trained_on` on
those of another set, `--inverted` on the set's own but used on images whose contrast is turned round. `--plain` trains
it on intensities rather than on edge profiles. Methods:

    copy               the annotated slice in every slice
    copy_clipped       the same between the first and the last slice that truly shows foreground, which flatters it
    registration_2d    slice to slice: each slice's label deformed onto the next by demons, outwards from the drawn one
    slice              SAM2, mode slice, the built-in checkpoint, its default views fused
    correspondence     its default views fused
    sam2               SAM2 as it is used beside correspondence: prompted by these three, it looks along three planes
    fused              all views of sam2 and correspondence fused, as propagate -propagator sam2 correspondence does

Dice on all slices but the annotated one, voxels of the volume pooled, mean over the classes ON the annotated slice
(a class that is not on it can come from the other volumes' slices alone); `all_classes` counts the others too.
Every case is appended to benchmarks/results/oneseg_<set>.partial, a finished set becomes oneseg_<set>.json; a finished
row is not computed again. Seed 0. Seconds are CPU seconds of one thread.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from builtin_checkpoint import Recorded
from common import RESULTS, markdown, read_row, write_row
from registration import dice, read_image, read_label, split_of
from suggest import spread

from nnunet_oneshot.consensus import view_weights
from nnunet_oneshot.suggest_features import along, describe
from nnunet_oneshot.suggest_ranking import best_slice
from sam2_propagation.consensus import fuse
from sam2_propagation.correspondence import CorrespondencePropagator
from sam2_propagation.correspondence_training import Recipe
from sam2_propagation.intensities import scale
from sam2_propagation.interface import Image, LabelVolume, Propagator, Support
from sam2_propagation.registration_slices import carried_through
from sam2_propagation.sam2 import Sam2Propagator
from sam2_propagation.views import Presentation, present

SETS = ("chaos_mr_t2", "acdc_mr", "hippocampus")
METHODS = ("copy", "copy_clipped", "registration_2d", "slice", "correspondence", "sam2", "fused")
IGNORE = 99


@dataclass(frozen=True)
class Setting:
    """What a row is of.

    Attributes:
        name: data set.
        count: cases.
        methods: in the order in which they run.
        suggested: the annotated slice is the suggested one rather than the one of the largest area.
        trained_on: set whose images correspondence is trained on; the set itself when None.
        inverted: images are shown with their contrast turned round, which training never saw.
        plain: correspondence sees intensities, not edge profiles.
    """

    name: str
    count: int
    methods: tuple[str, ...]
    suggested: bool = False
    trained_on: str | None = None
    inverted: bool = False
    plain: bool = False

    @property
    def title(self) -> str:
        """Name of the row's file."""
        parts = [f"oneseg_{self.name}_{self.count}", "suggested" if self.suggested else ""]
        parts += [f"trained_on_{self.trained_on}" if self.trained_on else "", "inverted" if self.inverted else ""]
        parts += ["plain" if self.plain else ""]
        return "_".join(part for part in parts if part)

    def image(self, case: str) -> Image:
        """A case's image as methods see it."""
        image = read_image(self.name, case)
        return replace(image, data=image.data.max() + image.data.min() - image.data) if self.inverted else image


def sparse_support(image: Image, truth: LabelVolume, suggested: bool) -> tuple[Support, Presentation, int]:
    """The case with one slice of its label, how its slices are shown, and which of them that is."""
    shown = present(image, "identity")
    seen = shown.forward(truth)
    index = int((seen > 0).sum(axis=(1, 2)).argmax())
    if suggested:
        found = describe(image)
        stored = best_slice(along(found.steps), found.content)
        index = len(seen) - 1 - stored if shown.flips[0] else stored
    label = np.full_like(seen, IGNORE)
    label[index] = seen[index]
    return Support(image, shown.inverse(label), IGNORE), shown, index


def copied(seen: LabelVolume, index: int, clipped: bool) -> LabelVolume:
    """The annotated slice everywhere, or only where there truly is foreground."""
    there = (seen > 0).any(axis=(1, 2))[:, None, None] if clipped else np.ones((len(seen), 1, 1), bool)
    return np.where(there, seen[index], 0).astype(np.int16)


def carried(propagator: Propagator, support: Support, others: Sequence[Support] = ()) -> dict[str, LabelVolume]:
    """Labels of every view that fits and gave one; others are supports of the same set."""
    supports = [support, *others]
    fitting = isinstance(propagator, Sam2Propagator)
    views = propagator.fitting_views(supports) if fitting else propagator.default_views
    found = propagator.propagate(supports, [support.image], views)
    return {result.view: result.label for result in found if result.label is not None}


def _fused(views: dict[str, LabelVolume], image: Image) -> LabelVolume:
    """As `propagate` fuses views `SOURCE/VIEW` of an image that a person drew on partly."""
    return fuse(list(views.values()), view_weights(list(views), partly_drawn=True), image.spacing).label


def _prompt(sam2: Propagator, carried_views: list[LabelVolume]) -> None:
    """Let SAM2 be prompted with what correspondence carried, as `propagate` does."""
    assert isinstance(sam2, Sam2Propagator)
    if isinstance(sam2.prompter, Recorded):
        sam2.prompter.label = fuse(carried_views).label if carried_views else None


def run_case(
    setting: Setting, case: str, propagators: dict[str, Propagator], drawn: dict[str, Support]
) -> dict[str, Any]:
    """Dice and seconds of every method on one case; `drawn` are the supports of the whole set."""
    image, truth = setting.image(case), read_label(setting.name, case)
    support, shown, index = sparse_support(image, truth, setting.suggested)
    others = [other for name, other in drawn.items() if name != case]
    seen, labels, seconds = shown.forward(truth), {}, {}
    views: dict[str, LabelVolume] = {}
    data = shown.forward(scale(image))[0]
    simple: dict[str, Callable[[], LabelVolume]] = {
        "copy": lambda: shown.inverse(copied(seen, index, False)),
        "copy_clipped": lambda: shown.inverse(copied(seen, index, True)),
        "registration_2d": lambda: shown.inverse(carried_through(data, seen, [index])),
        "fused": lambda: _fused(views, image),
    }
    for method in setting.methods:
        begin = time.process_time()
        if method in propagators:
            if method == "sam2":
                _prompt(propagators[method], list(views.values()))
            found = carried(propagators[method], support, others)
            found = {f"{method}/{view}": label for view, label in found.items()}
            views |= found if method != "slice" else {}
            labels[method] = _fused(found, image) if found else np.zeros_like(truth)
        else:
            labels[method] = simple[method]()
        seconds[method] = round(time.process_time() - begin, 1)
    return {
        "case": case,
        "slice": index,
        "slices": len(seen),
        "seconds": seconds,
        **scores(labels, seen, shown, index, setting.name),
    }


def scores(
    labels: dict[str, LabelVolume], seen: LabelVolume, shown: Presentation, index: int, name: str
) -> dict[str, Any]:
    """Dice on all slices but the annotated one."""
    every = [value for value in split_of(name)["labels"].values() if value]
    drawn = [value for value in every if (seen[index] == value).any()]
    rest = np.arange(len(seen)) != index
    found = {method: shown.forward(label)[rest] for method, label in labels.items()}
    return {
        "classes": drawn,
        "dice": {m: round(dice(label, seen[rest], drawn), 4) if drawn else 0.0 for m, label in found.items()},
        "all_classes": {m: round(dice(label, seen[rest], every), 4) for m, label in found.items()},
    }


def run_set(setting: Setting) -> dict[str, Any]:
    """One set's row, from its file if it is there."""
    if (row := read_row(setting.title)) is not None:
        return row
    partial = RESULTS / f"{setting.title}.partial"
    done = [json.loads(line) for line in partial.read_text(encoding="utf-8").splitlines()] if partial.is_file() else []
    cases = spread(split_of(setting.name)["pool"], setting.count)
    todo = [case for case in cases if case not in [entry["case"] for entry in done]]
    propagators, training = _propagators(setting) if todo else ({}, 0.0)
    drawn = {c: _drawn(setting, c) for c in cases} if todo else {}
    with partial.open("a", encoding="utf-8") as file:
        for case in todo:
            done.append(run_case(setting, case, propagators, drawn))
            file.write(json.dumps(done[-1]) + "\n")
            file.flush()
            print(case, done[-1]["dice"], done[-1]["seconds"], flush=True)
    row = _summary(setting, done)
    if todo:
        row["training_cpu_seconds"] = round(training, 1)
    partial.unlink()
    return write_row(setting.title, row)


def _drawn(setting: Setting, case: str) -> Support:
    return sparse_support(setting.image(case), read_label(setting.name, case), setting.suggested)[0]


def _propagators(setting: Setting) -> tuple[dict[str, Propagator], float]:
    made: dict[str, Propagator] = {}
    begin = time.process_time()
    if "correspondence" in setting.methods:
        learnt = setting.trained_on or setting.name
        images = (read_image(learnt, case) for case in sorted(split_of(learnt)["pool"]))
        # Trained anew, so that its seconds are known.
        with tempfile.TemporaryDirectory() as folder:
            made["correspondence"] = CorrespondencePropagator(
                recipe=Recipe(profile=not setting.plain), cache=Path(folder)
            )
            made["correspondence"].fit(images)
    seconds = time.process_time() - begin
    if "slice" in setting.methods:
        made["slice"] = Sam2Propagator(mode="slice")
    if "sam2" in setting.methods:
        made["sam2"] = Sam2Propagator(prompter=Recorded())
    return made, seconds


def _summary(setting: Setting, done: list[dict[str, Any]]) -> dict[str, Any]:
    def mean(kind: str) -> dict[str, float]:
        return {method: round(float(np.mean([entry[kind][method] for entry in done])), 4) for method in setting.methods}

    return {
        "set": setting.name,
        "annotated": "one slice a volume: " + ("suggested" if setting.suggested else "largest foreground area"),
        "correspondence_trained_on": setting.trained_on or setting.name,
        "inverted": setting.inverted,
        "profile": not setting.plain,
        "n": len(done),
        "annotated_share": round(float(np.mean([1 / entry["slices"] for entry in done])), 4),
        "dice": mean("dice"),
        "all_classes": mean("all_classes"),
        "cpu_seconds": mean("seconds"),
        "seed": 0,
        "cases": done,
    }


def main() -> None:
    """Fill in what is missing and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sets", nargs="+", default=list(SETS))
    parser.add_argument("--cases", type=int, default=8)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--suggested", action="store_true")
    parser.add_argument("--trained_on", choices=SETS)
    parser.add_argument("--inverted", action="store_true")
    parser.add_argument("--plain", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    how = (tuple(options.methods), options.suggested, options.trained_on, options.inverted, options.plain)
    rows = [run_set(Setting(name, options.cases, *how)) for name in options.sets]
    cells = [[r["set"], r["n"], *(f"{r['dice'][m]:.3f}" for m in options.methods)] for r in rows]
    print(markdown(["set", "n", *options.methods], cells))


if __name__ == "__main__":
    main()
