"""What every propagator takes and gives: three frozen records and one protocol.

Axis order is nnU-Net's everywhere: channels first, then (Z, Y, X); a 2D image has Z = 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

FloatVolume = npt.NDArray[np.float32]
"""float32 array, (Z, Y, X)."""
ChannelVolume = npt.NDArray[np.float32]
"""float32 array, (C, Z, Y, X)."""
LabelVolume = npt.NDArray[np.int16]
"""int16 array, (Z, Y, X); 0 is background."""
BoolVolume = npt.NDArray[np.bool_]
"""bool array, (Z, Y, X)."""

IDENTITY_DIRECTION = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)


@dataclass(frozen=True, eq=False)
class Image:
    """One image of a case.

    Attributes:
        case: the case identifier.
        data: float32 (C, Z, Y, X), intensities as stored in the files.
        spacing: (z, y, x) in mm; (1, 1, 1) where the format holds none.
        origin: (x, y, z) in mm, the position of voxel 0 as in SimpleITK.
        direction: nine direction cosines, row-major, x/y/z order as in SimpleITK.
    """

    case: str
    data: ChannelVolume
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)
    origin: tuple[float, float, float] = (0.0, 0.0, 0.0)
    direction: tuple[float, ...] = IDENTITY_DIRECTION

    def __post_init__(self) -> None:
        if self.data.ndim != 4:
            raise ValueError(f"{self.case}: image data must be (C, Z, Y, X), found shape {self.data.shape}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(Z, Y, X)."""
        z, y, x = self.data.shape[1:]
        return z, y, x


@dataclass(frozen=True, eq=False)
class Support:
    """An annotated image that a label comes from.

    Attributes:
        image: the annotated image.
        label: int16 (Z, Y, X), same grid as the image.
        ignore: the label value of un-annotated voxels of a sparse label, or None for a whole label.
    """

    image: Image
    label: LabelVolume
    ignore: int | None = None

    def __post_init__(self) -> None:
        if self.label.shape != self.image.shape:
            raise ValueError(
                f"{self.image.case}: label shape {self.label.shape} differs from image shape {self.image.shape}"
            )

    @property
    def classes(self) -> tuple[int, ...]:
        """Foreground label values that are present, ascending, without the ignore label."""
        return tuple(int(v) for v in np.unique(self.label) if v != 0 and v != self.ignore)

    @property
    def is_sparse(self) -> bool:
        """Whether some voxels are not annotated."""
        return self.ignore is not None and bool((self.label == self.ignore).any())


@dataclass(frozen=True, eq=False)
class Propagation:
    """What one view of one propagator says of one query: a label, or the reason why there is none.

    Attributes:
        case: the query's case identifier.
        view: the view's name, unique within the propagator.
        label: int16 (Z, Y, X) on the query's grid, or None when the propagation failed.
        confidence: optional float32 (Z, Y, X) in [0, 1].
        reason: why it failed, one sentence; None when it did not.
        scores: label-free figures of this propagation (similarity, predicted IoU, ...), kept for quality estimation.
    """

    case: str
    view: str
    label: LabelVolume | None
    confidence: FloatVolume | None = None
    reason: str | None = None
    scores: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.label is None) == (self.reason is None):
            raise ValueError(f"{self.case}/{self.view}: a propagation has either a label or a reason for its absence")


@runtime_checkable
class Propagator(Protocol):
    """Anything that carries support labels to queries.

    Attributes:
        name: the source name, as in `pseudoTr/<name>/<view>/`.
        views: every view that it offers, the default ones first.
        default_views: the views that are used unless told otherwise.
        whole_set: True if it must see all queries in one call (YoloSeg's sequence); False if queries are independent
            and may be sharded over processes.
    """

    name: str
    views: tuple[str, ...]
    default_views: tuple[str, ...]
    whole_set: bool

    def fit(self, images: Iterable[Image]) -> None:
        """Learn from images without labels; may do nothing."""

    def adapt(self, supports: Sequence[Support], views: Sequence[str]) -> None:
        """Learn from the annotated images, once, before workers get a copy; may do nothing."""

    def propagate(
        self, supports: Sequence[Support], queries: Iterable[Image], views: Sequence[str]
    ) -> Iterator[Propagation]:
        """Yield one Propagation for each query and view, queries in the order given."""
