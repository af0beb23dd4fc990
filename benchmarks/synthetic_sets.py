"""Image sets made of synthetic anatomy, for what must be learnt where truth is known and no real image takes part.

Each set is one drawn anatomy (`sam2_propagation.pretraining`): an annotated subject, others as unlike it as the set's
own draw says, most of them with the annotated one's contrast and some with one of their own. One to three parts are
labelled. Phantoms (`nnunet_oneshot.phantom`) all are one trunk whose labels carry well; here labels also carry badly.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch

from sam2_propagation.pretraining.appearance import Look, draw_look, same_contrast
from sam2_propagation.pretraining.pairing import Group, render_groups
from sam2_propagation.pretraining.parts import Subject, another_subject, first_subject
from sam2_propagation.pretraining.templates import draw_parts

SEED = 2**30
"""Of these sets; pretraining and its validation use others."""
SIZES = ((12, 72), (28, 56))
"""Slices and pixels along both edges, in turn: thick slices and nearly isotropic ones."""
LEAST, MOST = 0.004, 0.25
"""Share of the annotated volume that a labelled part fills."""
OTHER_CONTRAST = 0.15
"""Share of the images with a contrast of their own."""
REACH = 0.8
"""Heights of the first and last slice, of the half stack that anatomy fills."""


@dataclass(frozen=True)
class Drawn:
    """One image: whose, and how it looks."""

    subject: Subject
    look: Look


def write_synthetic_dataset(raw: Path, number: int, name: str, truth: Path, seed: int, cases: int) -> Path:
    """Write set `seed` as an nnU-Net raw dataset in which the first case is annotated; all labels go to `truth`."""
    rng = np.random.default_rng([SEED, seed])
    slices, size = SIZES[seed % len(SIZES)]
    volumes, values = _drawn_set(rng, cases, slices, size)
    folder = raw / f"Dataset{number:03d}_{name}"
    for sub in (folder / "imagesTr", folder / "labelsTr", truth):
        sub.mkdir(parents=True, exist_ok=True)
    spacing = (1.0, 1.0, size / slices)
    for place, (image, parts) in enumerate(volumes, start=1):
        label, case = _label(parts, values), f"{name}_{place:03d}"
        _write(folder / "imagesTr" / f"{case}_0000.nii.gz", (image * 1000).astype(np.int16), spacing)
        _write(truth / f"{case}.nii.gz", label, spacing)
        if place == 1:
            _write(folder / "labelsTr" / f"{case}.nii.gz", label, spacing)
    labels = {"background": 0, **{f"part {i}": i for i in range(1, len(values) + 1)}}
    content = {"channel_names": {"0": "MRI"}, "labels": labels, "numTraining": 1, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(content, indent=2), encoding="utf-8")
    return folder


def _drawn_set(
    rng: np.random.Generator, cases: int, slices: int, size: int
) -> tuple[list[tuple[np.ndarray, np.ndarray]], list[int]]:
    """The subjects' volumes and the parts that are labelled; drawn again until there is something to label."""
    while True:
        first = Drawn(first_subject(rng, draw_parts(rng)), draw_look(rng))
        volume = _render(first, rng, slices, size)
        shares = np.bincount(volume[1].ravel(), minlength=2) / volume[1].size
        candidates = [int(v) for v in np.flatnonzero((shares >= LEAST) & (shares <= MOST)) if v > 0]
        if candidates:
            break
    values = sorted(rng.permutation(candidates)[: int(rng.integers(1, 4))].tolist())
    unlike = float(rng.uniform(0.3, 1))
    others = [_another(rng, first, unlike) for _ in range(cases - 1)]
    return [volume, *(_render(one, rng, slices, size) for one in others)], values


def _another(rng: np.random.Generator, first: Drawn, unlike: float) -> Drawn:
    subject = another_subject(rng, first.subject, unlike * float(rng.uniform(0.5, 1)))
    look = draw_look(rng) if rng.random() < OTHER_CONTRAST else same_contrast(rng, first.look, unlike)
    return Drawn(subject, replace(look, window=first.look.window))


def _render(drawn: Drawn, rng: np.random.Generator, slices: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Image in [0, 1] and part numbers, (Z, Y, X)."""
    heights = tuple(np.linspace(-REACH, REACH, slices).tolist())
    group = Group((drawn.subject,), (0,) * slices, heights, (drawn.look,) * slices)
    image, parts = render_groups([group], rng, size, torch.device("cpu"))
    return image.numpy(), parts.numpy()


def _label(parts: np.ndarray, values: list[int]) -> np.ndarray:
    label = np.zeros(parts.shape, np.uint8)
    for new, value in enumerate(values, start=1):
        label[parts == value] = new
    return label


def _write(path: Path, array: np.ndarray, spacing: tuple[float, float, float]) -> None:
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing)
    sitk.WriteImage(image, str(path), True)
