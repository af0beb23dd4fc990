"""Which other slice to annotate where single drawn slices do not show every class.

Other cases say at which height they show it, if slices were drawn along the same axis of the body there. Where none
does, the slice that stands best for what the drawn ones leave out is named instead (`suggest_ranking`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from nnunet_oneshot.dataset import Case, RawDataset
from nnunet_oneshot.suggest_features import along, describe
from nnunet_oneshot.suggest_ranking import best_slice
from sam2_propagation.interface import Image, LabelVolume
from sam2_propagation.views import plane_across, present

Heights = dict[tuple[str, str], list[float]]
"""Where cases show a class, in [0, 1] along the body's axis, by (plane, class)."""


@dataclass(frozen=True, eq=False)
class Drawn:
    """Slices that were drawn of one case.

    Attributes:
        case: whose.
        label: (Z, Y, X), the ignore label wherever nobody drew.
        axis: of the array that slices are counted along.
        slices: those drawn, from 0.
        missing: names of classes that none of them shows.
    """

    case: Case
    label: LabelVolume
    axis: int
    slices: tuple[int, ...]
    missing: tuple[str, ...]


def advice(raw: RawDataset, drawn: Sequence[Drawn]) -> dict[str, str]:
    """By case, a sentence that names another slice for each class it misses; no entry where none is missing."""
    if not any(d.missing for d in drawn):
        return {}
    heights: Heights = {}
    for one in drawn:
        plane, backwards = _plane(raw.read_image(one.case), one.axis)
        for name, height in _shown(one, raw.class_names):
            heights.setdefault((plane, name), []).append(1 - height if backwards else height)
    return {d.case.name: _advice(d, raw.read_image(d.case), heights) for d in drawn if d.missing}


def _plane(image: Image, axis: int) -> tuple[str, bool]:
    """The plane that slices along an axis of the array lie in, and whether they are stored last to first."""
    plane = plane_across(image, axis)
    return plane, present(image, plane).flips[0]


def _shown(drawn: Drawn, classes: Mapping[int, str]) -> Iterator[tuple[str, float]]:
    """Each class that a drawn slice shows with the slice's height, as stored; one slice alone has no height."""
    count = drawn.label.shape[drawn.axis]
    for index in drawn.slices if count > 1 else ():
        values = np.unique(np.take(drawn.label, index, drawn.axis)).tolist()
        yield from ((classes[value], (index + 0.5) / count) for value in values if value in classes)


def _advice(drawn: Drawn, image: Image, heights: Heights) -> str:
    left = [i for i in range(image.shape[drawn.axis]) if i not in drawn.slices]
    if not left:
        return "it has no other slice: annotate another case that shows what is missing"
    plane, backwards = _plane(image, drawn.axis)
    known = {name: heights[plane, name] for name in drawn.missing if (plane, name) in heights}
    at = {name: _nearest(values, left, image.shape[drawn.axis], backwards) for name, values in known.items()}
    told = [f"{name} (around slice {index})" for name, index in at.items()]
    nowhere = [name for name in drawn.missing if name not in at]
    parts = [f"annotate another slice of it for {', '.join(told)}"] if told else []
    if nowhere:
        found = describe(image, view=plane)
        index = best_slice(along(found.steps), found.content, chosen=drawn.slices)
        parts.append(
            f"no slice drawn along this axis shows {', '.join(nowhere)}: annotate one that does, or slice {index}, "
            "which stands best for the rest of it"
        )
    return "; ".join(parts)


def _nearest(heights: Sequence[float], left: Sequence[int], count: int, backwards: bool) -> int:
    """The slice that nobody drew nearest to the median height."""
    height = float(np.median(heights))
    place = (1 - height if backwards else height) * count - 0.5
    return min(left, key=lambda index: (round(abs(index - place), 6), index))
