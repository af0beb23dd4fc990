"""One picture of all suggestions: the slice that stands best for each case, with its rank and name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from PIL import Image as Picture
from PIL import ImageDraw

from nnunet_oneshot.report_pictures import Overlay, draw_slice
from sam2_propagation.interface import Image

SIZE = 200
COLUMNS = 5
MOST = 50
"""More tiles than that nobody looks at; the table holds them all."""
_CAPTION = 14
_GAP = 4


class Row(Protocol):
    """What a tile says."""

    @property
    def rank(self) -> int: ...

    @property
    def case(self) -> str: ...

    @property
    def axis(self) -> str: ...

    @property
    def slice(self) -> int: ...


def picture_of(rows: Sequence[Row], read: Callable[[str], Image]) -> Picture.Image:
    """A contact sheet of the rows' slices, the first at the top left; `read` gives a case's image."""
    shown = rows[:MOST]
    cell = SIZE + _GAP, SIZE + _CAPTION + _GAP
    lines = -(-len(shown) // COLUMNS)
    sheet = Picture.new("RGB", (min(COLUMNS, len(shown)) * cell[0], lines * cell[1]), (20, 20, 20))
    for at, row in enumerate(shown):
        line, column = divmod(at, COLUMNS)
        sheet.paste(_tile(read(row.case), row), (column * cell[0], line * cell[1]))
    return sheet


def _tile(image: Image, row: Row) -> Picture.Image:
    tile = Picture.new("RGB", (SIZE, SIZE + _CAPTION), (20, 20, 20))
    blank = np.zeros(image.shape, np.int16)
    drawn = draw_slice(Overlay(image, blank, blank > 0), "zyx".index(row.axis), row.slice, SIZE)
    tile.paste(drawn, ((SIZE - drawn.width) // 2, _CAPTION + (SIZE - drawn.height) // 2))
    ImageDraw.Draw(tile).text((2, 1), f"{row.rank}  {row.case}  {row.axis} {row.slice}", fill=(255, 255, 255))
    return tile
