"""How the sam2 propagator works: one record of settings, and the published procedures as such records."""

from __future__ import annotations

from dataclasses import dataclass, field

from sam2_propagation.errors import PropagationError
from sam2_propagation.intensities import Intensities

MODES = ("insert", "sequence", "slice", "retrieve", "self")
"""Every mode; see `Sam2Settings.mode`."""

MATCHINGS = ("position", "line", "similarity", "near")
"""How support slices are found for a query slice."""


TURNED = ("identity", "rot90", "rot180")
"""YoloSeg's three views."""


def _one_of(what: str, found: str | None, known: tuple[str | None, ...]) -> None:
    if found not in known:
        names = ", ".join(str(k) for k in known if k is not None)
        raise PropagationError(f"expected {what} out of {names}, found {found!r}; choose one of those")


LEAST_SHARE = {"slice": 0.7, "insert": 0.4, "retrieve": 0.4, "self": 0.0, "sequence": 0.0}
"""For the built-in weights, by `benchmarks/presence.py` in `slice` and `retrieve`; `insert` takes the latter's. In
`self` a trial gave nothing, and `sequence` was not measured."""


@dataclass(frozen=True)
class Sam2Settings:
    """Settings of the sam2 propagator.

    Attributes:
        mode: `insert` (the support's stack is inserted into the query's sequence and tracked out of, both ways),
            `sequence` (all 2D images of a set are one sequence), `slice` (annotated slices of a volume through that
            volume), `retrieve` (matching support slices are each query slice's memory), `self` (the query's own
            slices, prompted with another propagator's labels, are the memory), or None: `self` where there is a
            prompting propagator, else `retrieve`; a query with a sparse label of its own goes through `slice` first,
            which prompts as well, or is all where there is no prompting propagator.
        views: the default views; these three may give way to three planes (see `Sam2Propagator.fitting_views`).
        checkpoint: the default checkpoint.
        intensities: windows and channels.
        memory_slices: slices that each query slice remembers in `retrieve` and `self`.
        matching: `position` (relative position in the stack), `line` (the straight line of slice numbers along which
            embeddings are most alike), `similarity` (of embeddings, slice by slice) or `near` (the most alike by
            `similarity` of slices at about the same relative position, within 10 % of the stack).
        align: in `insert` and `retrieve`, bring supports onto the query's grid by registration's affine first; they are
            then other slices for every query, and are encoded anew.
        track: in `retrieve`, also remember the query's neighbouring slices, tracked both ways.
        own_slice: in `self`, whether a slice's own prompted label is among its memory.
        support_slices: in `self`, matching support slices that are remembered as well.
        margin: in `self`, how many slices beyond the prompted ones an object is looked for.
        zoom: in `self`, look only at the part of the slices around the prompted objects, with so much margin on each
            side, as a share of their extent; None to look at whole slices.
        repeats: in `self`, how often; each time prompted with what the time before gave.
        insertions: in `insert`, how often each support is inserted.
        positions: where, as fractions of the query's stack; drawn from the seed when None.
        whole_stack: in `insert`, insert every annotated slice, not only those with foreground.
        average: of the votes of insertions, supports and directions: of `logits` or of `probabilities`.
        background: in `sequence`, the background is an object of its own.
        order: in `sequence`, `file` (by case identifier) or `similarity` (to the support's embedding).
        recent: how many of the frames before it a tracked frame remembers; None for the checkpoint's own number.
        max_conditioning: nearest prompted frames that tracking attends to; None for the checkpoint's own (mostly all).
        largest_component: keep only the largest component of each class.
        fill_hole_area: see `tracker.Tracker`.
        least_share: an object is taken to be absent from a slice where the IoU that the decoder predicts is below this
            share of the highest that it predicts for that object in that image (so far, where it tracks); for
            checkpoints without a head for an object's presence. None for LEAST_SHARE of the mode.
    """

    mode: str | None = None
    views: tuple[str, ...] = TURNED
    checkpoint: str = "builtin"
    intensities: Intensities = field(default_factory=Intensities)
    memory_slices: int = 4
    matching: str = "position"
    align: bool = False
    track: bool = False
    own_slice: bool = True
    support_slices: int = 0
    margin: int = 1
    zoom: float | None = 0.25
    repeats: int = 1
    insertions: int = 1
    positions: tuple[float, ...] | None = None
    whole_stack: bool = False
    average: str = "logits"
    background: bool = False
    order: str = "file"
    recent: int | None = None
    max_conditioning: int | None = None
    largest_component: bool = False
    fill_hole_area: int = 0
    least_share: float | None = None

    def __post_init__(self) -> None:
        _one_of("a mode", self.mode, (None, *MODES))
        _one_of("a matching", self.matching, MATCHINGS)
        _one_of("an average", self.average, ("logits", "probabilities"))
        _one_of("an order", self.order, ("file", "similarity"))
        for name in ("memory_slices", "repeats", "insertions"):
            if getattr(self, name) < 1:
                raise PropagationError(f"expected {name} of at least 1, found {getattr(self, name)}")
        if self.least_share is not None and not 0 <= self.least_share < 1:
            raise PropagationError(f"expected least_share of at least 0 and below 1, found {self.least_share}")
        if self.max_conditioning is not None and self.max_conditioning < 2:
            raise PropagationError(f"expected max_conditioning of at least 2, found {self.max_conditioning}")

    def least_share_in(self, mode: str) -> float:
        """`least_share`, or the mode's own."""
        return LEAST_SHARE[mode] if self.least_share is None else self.least_share

    def check_fit(self, case: str, shape: tuple[int, ...], sparse: bool) -> None:
        """Check that an image fits the mode.

        Args:
            case: its identifier, for the message.
            shape: (Z, Y, X).
            sparse: whether it has a sparse label of its own, with foreground.

        Raises:
            PropagationError: a volume in mode `sequence`, or no sparse label in mode `slice`.
        """
        if self.mode == "sequence" and shape[0] != 1:
            raise PropagationError(
                f"expected 2D images for mode sequence, found {case} of shape {shape}; use mode insert or retrieve for "
                "volumes"
            )
        if self.mode == "slice" and not sparse:
            raise PropagationError(
                f"expected a sparse label of {case} itself, with foreground, for mode slice, found none; annotate a "
                "slice of it, or use mode retrieve"
            )


# None of them drops an object for a low predicted IoU: with any checkpoint, `least_share` is 0.
_RECIPES = {
    # YoloSeg (Medical Image Analysis 2026): the image set as a video in file order, background included, three views,
    # 8-bit intensities as they are.
    "yoloseg": Sam2Settings(
        mode="sequence",
        checkpoint="sam2.1_hiera_small",
        views=TURNED,
        intensities=Intensities(window=(0.0, 255.0)),
        background=True,
        least_share=0.0,
    ),
    # SSL-MedSAM2 (CARE-LiSeg at MICCAI 2025): the whole annotated stack inserted at five random positions, every mask
    # of it prompting (slices without one are tracked as the query's are), probabilities averaged, the largest component
    # kept.
    "ssl_medsam2": Sam2Settings(
        mode="insert",
        checkpoint="medsam2_latest",
        views=("identity",),
        intensities=Intensities(positive=True),
        insertions=5,
        whole_stack=True,
        average="probabilities",
        largest_component=True,
        least_share=0.0,
    ),
}


def recipe(name: str) -> Sam2Settings:
    """A published procedure's settings, `yoloseg` or `ssl_medsam2`.

    Raises:
        PropagationError: another name.
    """
    _one_of("a recipe", name, tuple(_RECIPES))
    return _RECIPES[name]
