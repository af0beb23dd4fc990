"""One picture of all cases of a trial, a row each, with what is said of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image as Picture
from PIL import ImageDraw

from nnunet_oneshot.report_pictures import Overlay, contact_sheet

COLUMNS, SIZE, CAPTION = 6, 200, 18


@dataclass(frozen=True, eq=False)
class Tile:
    """A case's image with its label, and a line about it."""

    overlay: Overlay
    line: str


def draw(tiles: Sequence[Tile], path: Path) -> None:
    """Write a PNG of all cases, one above the other; divergence is drawn in its own colour."""
    sheets = [(tile.line, contact_sheet(tile.overlay, columns=COLUMNS, rows=1, size=SIZE)) for tile in tiles]
    width = max(sheet.width for _, sheet in sheets)
    height = sum(sheet.height + CAPTION for _, sheet in sheets)
    whole, top = Picture.new("RGB", (width, height), "white"), 0
    pen = ImageDraw.Draw(whole)
    for line, sheet in sheets:
        pen.text((4, top + 3), line, fill="black")
        whole.paste(sheet, (0, top + CAPTION))
        top += CAPTION + sheet.height
    whole.save(path)
