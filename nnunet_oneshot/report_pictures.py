"""Pictures of labels over images, as bytes of small files: no plotting library, no display.

Colours are Okabe and Ito's, which people with any common colour blindness tell apart (jfly.uni-koeln.de/color). Slices
are shown as radiologists hang them: the patient's left on the right, the front or the head above, pixels as wide and
as high as they are in the patient.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image as Picture
from PIL import ImageDraw
from scipy import ndimage

from sam2_propagation.interface import BoolVolume, Image, LabelVolume

Color = tuple[int, int, int]
Plane = npt.NDArray[np.generic]
"""One slice, (rows, columns) or (rows, columns, 3)."""

CLASS_COLORS: tuple[Color, ...] = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (213, 94, 0),
    (0, 114, 178),
)
"""Of label values 1, 2, ...; after the last they begin again in the next shade."""
SHADES: tuple[tuple[int, float], ...] = ((0, 0.0), (255, 0.55), (0, 0.45))
"""Towards which grey, and how far: as they are, lighter, darker."""
DIVERGENCE_COLOR: Color = (204, 121, 167)
_LETTERS = (("R", "L"), ("A", "P"), ("I", "S"))
"""Names of the negative and the positive direction of SimpleITK's x, y and z axes."""


@dataclass(frozen=True, eq=False)
class Overlay:
    """What a picture shows.

    Attributes:
        image: the case's image.
        label: the best guess everywhere, (Z, Y, X).
        divergence: voxels without consensus, (Z, Y, X).
        oriented: False for formats that hold no direction: nothing is marked or turned.
    """

    image: Image
    label: LabelVolume
    divergence: BoolVolume
    oriented: bool = True


def shown_divergence(target: LabelVolume, ignore: int) -> BoolVolume:
    """Where a training label is ignore, as pictures show it: nowhere where it is ignore throughout.

    Such a case is left out as a whole, which its status says; a tint over all of it would only hide the label.
    """
    ignored = target == ignore
    return np.zeros_like(ignored) if ignored.all() else ignored


def class_color(value: int) -> Color:
    """The colour of a label value, from 1."""
    turn, place = divmod(value - 1, len(CLASS_COLORS))
    grey, share = SHADES[turn % len(SHADES)]
    red, green, blue = (round((1 - share) * part + share * grey) for part in CLASS_COLORS[place])
    return red, green, blue


def data_uri(picture: Picture.Image, quality: int = 80) -> str:
    """The picture inside an address, JPEG."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def thumbnail(overlay: Overlay, size: int = 112) -> Picture.Image:
    """The slice with most label, no side longer than `size` pixels."""
    axis = slice_axis(overlay.image)
    return draw_slice(overlay, axis, _fullest(overlay.label, axis), size, marks=False)


def contact_sheet(overlay: Overlay, columns: int = 4, rows: int = 2, size: int = 230) -> Picture.Image:
    """Slices evenly over the label's extent, then one slice of each other plane of a volume."""
    axis = slice_axis(overlay.image)
    indices = _spread(overlay.label, axis, columns * rows - (2 if min(overlay.image.shape) > 1 else 0))
    tiles = [draw_slice(overlay, axis, index, size) for index in indices]
    if min(overlay.image.shape) > 1:
        others = [a for a in range(3) if a != axis]
        tiles += [draw_slice(overlay, a, _fullest(overlay.label, a), size) for a in others]
    return _mosaic(tiles, columns)


def slice_axis(image: Image) -> int:
    """The axis across the acquired slices: the one of the coarsest spacing, the first where all are alike."""
    if image.shape[0] == 1:
        return 0
    spacing = np.asarray(image.spacing)
    return int(spacing.argmax()) if spacing.max() > 1.5 * spacing.min() else 0


def draw_slice(overlay: Overlay, axis: int, index: int, size: int, *, marks: bool = True) -> Picture.Image:
    """One slice across an axis of (Z, Y, X), no side longer than `size` pixels."""
    rows, columns = (a for a in range(3) if a != axis)
    flips, letters = _hanging(overlay.image, rows, columns) if overlay.oriented else ((False, False), ("", ""))
    grey = _turned(_window(overlay.image, axis, index), flips)
    shape = _displayed(overlay.image, rows, columns, size)
    base = np.asarray(Picture.fromarray(grey).resize(shape, Picture.Resampling.BILINEAR).convert("RGB"), dtype=float)
    label = _resized(_turned(np.take(overlay.label, index, axis), flips), shape)
    divergence = _resized(_turned(np.take(overlay.divergence, index, axis), flips), shape) > 0
    picture = Picture.fromarray(_painted(base, label, divergence).astype(np.uint8))
    if marks and overlay.oriented:
        _mark(picture, letters, f"{index + 1}/{overlay.image.shape[axis]}")
    return picture


def _window(image: Image, axis: int, index: int) -> npt.NDArray[np.uint8]:
    """Intensities of a slice as bytes; colour where a picture has three channels."""
    if image.data.shape[0] == 3 and image.shape[0] == 1:
        return np.clip(np.moveaxis(image.data[:, 0], 0, -1), 0, 255).astype(np.uint8)
    sample = image.data[0].ravel()[:: max(1, image.data[0].size // 100_000)]
    foreground = sample[sample > sample.min()]
    low, high = np.percentile(foreground if foreground.size else sample, (0.5, 99.5))
    scaled = (np.take(image.data[0], index, axis) - low) / max(high - low, 1e-6)
    return (255 * np.clip(scaled, 0, 1)).astype(np.uint8)


def _painted(
    base: npt.NDArray[np.float64], label: npt.NDArray[np.int64], divergence: npt.NDArray[np.bool_]
) -> npt.NDArray[np.float64]:
    """Divergence tinted, label contours on top."""
    base[divergence] = 0.45 * base[divergence] + 0.55 * np.array(DIVERGENCE_COLOR)
    for value in np.unique(label[label > 0]):
        mask = label == value
        base[mask & ~ndimage.binary_erosion(mask, iterations=2)] = class_color(int(value))
    return base


def _hanging(image: Image, rows: int, columns: int) -> tuple[tuple[bool, bool], tuple[str, str]]:
    """((flip rows, flip columns), (letter above, letter at the left)) so that the front, head or right come first."""
    flips, letters = [], []
    for axis in (rows, columns):
        direction = np.asarray(image.direction).reshape(3, 3)[:, 2 - axis]
        world = int(np.abs(direction).argmax())
        begin, end = _LETTERS[world] if direction[world] > 0 else _LETTERS[world][::-1]
        flip = begin in "LPI"
        flips.append(flip)
        letters.append(end if flip else begin)
    return (flips[0], flips[1]), (letters[0], letters[1])


def _turned(plane: Plane, flips: tuple[bool, bool]) -> Plane:
    return plane[:: -1 if flips[0] else 1, :: -1 if flips[1] else 1]


def _displayed(image: Image, rows: int, columns: int, size: int) -> tuple[int, int]:
    """(width, height) in pixels, in proportion to millimetres."""
    extent = np.array([image.shape[a] * image.spacing[a] for a in (columns, rows)])
    width, height = np.maximum(np.round(size * extent / extent.max()), 8).astype(int)
    return int(width), int(height)


def _resized(plane: Plane, shape: tuple[int, int]) -> npt.NDArray[np.int64]:
    small = Picture.fromarray(np.ascontiguousarray(plane).astype(np.int32))
    return np.asarray(small.resize(shape, Picture.Resampling.NEAREST)).astype(np.int64)


def _mark(picture: Picture.Image, letters: tuple[str, str], corner: str) -> None:
    draw = ImageDraw.Draw(picture)
    width, height = picture.size
    places = {(width // 2 - 3, 1): letters[0], (3, height // 2 - 6): letters[1], (3, height - 13): corner}
    for place, text in places.items():
        draw.text(place, text, fill=(255, 255, 255), stroke_width=1, stroke_fill=(0, 0, 0))


def _fullest(label: LabelVolume, axis: int) -> int:
    area = (label > 0).sum(tuple(a for a in range(3) if a != axis))
    return int(area.argmax()) if area.any() else len(area) // 2


def _spread(label: LabelVolume, axis: int, count: int) -> list[int]:
    """Up to `count` distinct slice indices, evenly from the first to the last slice that holds label."""
    present = np.flatnonzero((label > 0).any(tuple(a for a in range(3) if a != axis)))
    first, last = (present[0], present[-1]) if present.size else (0, label.shape[axis] - 1)
    return sorted({int(i) for i in np.round(np.linspace(first, last, min(count, label.shape[axis])))})


def _mosaic(tiles: Sequence[Picture.Image], columns: int) -> Picture.Image:
    cell = max(max(tile.size) for tile in tiles)
    lines = [tiles[i : i + columns] for i in range(0, len(tiles), columns)]
    heights = [max(tile.height for tile in line) + 4 for line in lines]
    sheet = Picture.new("RGB", (min(columns, len(tiles)) * (cell + 4), sum(heights)), (20, 20, 20))
    for row, line in enumerate(lines):
        for column, tile in enumerate(line):
            sheet.paste(tile, (column * (cell + 4), sum(heights[:row])))
    return sheet
