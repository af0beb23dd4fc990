"""From a data set's images to a trained network: which slices it sees, and where the network is kept for next time."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor
from tqdm import tqdm

from sam2_propagation.correspondence_network import FORMAT, CorrespondenceNetwork
from sam2_propagation.correspondence_stack import at_size, fitting_pitch, stack_of
from sam2_propagation.correspondence_training import Learner, Recipe
from sam2_propagation.errors import PropagationError
from sam2_propagation.interface import Image

VOLUMES = 40
"""Images that training sees at most: a sample, drawn as they pass by."""
SLICES = 64
"""Slices of each of them at most, in one piece around the middle."""


@dataclass(frozen=True, eq=False)
class Learned:
    """A trained network and the scale that it sees images at.

    Attributes:
        network: on the CPU, for use.
        channels: of the images.
        pitch: mm along the side of a working pixel.
    """

    network: CorrespondenceNetwork
    channels: int
    pitch: float


@dataclass(frozen=True, eq=False)
class _Seen:
    """What is kept of an image: slices (N, C, H, W), float16, and the side of their pixels in mm."""

    slices: Tensor
    pitch: float


def learn(images: Iterable[Image], recipe: Recipe, device: torch.device, folder: Path) -> Learned:
    """Train on images without labels, or take up what was trained on the very same images before.

    Args:
        images: of one kind, each seen once.
        recipe: how to train.
        device: where.
        folder: holds networks by the images and the recipe they were made with; a stopped training goes on from there.

    Raises:
        PropagationError: no image, images of different numbers of channels, or no permission to use `folder`.
    """
    sample, digest = _sampled(images, recipe)
    channels = {seen.slices.shape[1] for seen in sample}
    if len(channels) != 1:
        raise PropagationError(
            "expected images of one number of channels to learn correspondence from, found "
            f"{sorted(channels) or 'none'}; give all images the same channels"
        )
    pitch = float(np.median([seen.pitch for seen in sample]))
    path = folder / f"correspondence-{digest}.pt"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Shards that start side by side train one network, not one each.
        with FileLock(f"{path}.lock"):
            learner = _taken_up(recipe, channels.pop(), device, path)
            if learner.step < recipe.steps:
                _train(learner, [_at_pitch(seen, pitch) for seen in sample], path)
    except OSError as error:
        raise PropagationError(
            f"expected a folder that networks can be kept in, found {folder} ({error.strerror}); set "
            "nnUNet_oneshot_checkpoints to another one"
        ) from error
    return Learned(learner.network.cpu().eval(), sample[0].slices.shape[1], pitch)


def _taken_up(recipe: Recipe, channels: int, device: torch.device, path: Path) -> Learner:
    """What is kept in the file, or a new learner where there is nothing that can be used."""
    learner = Learner(recipe, channels, device)
    if path.is_file():
        try:
            learner.restore(path)
        except PropagationError:
            # The images are at hand: what the file held can be had again, and its place is taken when it is.
            print(f"{path.name} cannot be read: correspondence is learnt anew", file=sys.stderr)
            return Learner(recipe, channels, device)
    return learner


def _train(learner: Learner, volumes: list[Tensor], path: Path) -> None:
    steps = learner.recipe.steps
    with tqdm(total=steps, initial=learner.step, desc="learn correspondence", unit="step", file=sys.stderr) as bar:

        def tick(loss: float) -> None:
            bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
            bar.update()

        learner.train(volumes, path, tick=tick)


def _sampled(images: Iterable[Image], recipe: Recipe) -> tuple[list[_Seen], str]:
    """Some of the images, every one as likely as any other, and a digest of all, recipe and format."""
    rng = np.random.default_rng(recipe.seed)
    sample: list[_Seen] = []
    digest = hashlib.blake2b(repr((FORMAT, *sorted(asdict(recipe).items()))).encode(), digest_size=12)
    for number, image in enumerate(images):
        digest.update(repr((image.case, image.spacing, image.data.shape)).encode())
        digest.update(np.ascontiguousarray(image.data).data)
        at = number if number < VOLUMES else int(rng.integers(number + 1))
        if at < VOLUMES:
            sample[at : at + 1] = [_seen(image)]
    return sample, digest.hexdigest()


def _seen(image: Image) -> _Seen:
    pitch = fitting_pitch(image)
    stack = stack_of(image, pitch)
    first = max(0, len(stack) - SLICES) // 2
    kept = stack.slices[first : first + SLICES, :, : stack.used[0], : stack.used[1]]
    return _Seen(kept.half(), pitch)


def _at_pitch(seen: _Seen, pitch: float) -> Tensor:
    rows, columns = (max(8, round(side * seen.pitch / pitch)) for side in seen.slices.shape[-2:])
    return at_size(seen.slices.float(), (rows, columns)).half()
