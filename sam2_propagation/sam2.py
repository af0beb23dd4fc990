"""The sam2 propagator: labels carried to other images by SAM2's memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sam2_propagation.architecture import Config
from sam2_propagation.checkpoints import LoadedCheckpoint, load_checkpoint
from sam2_propagation.embeddings import DEFAULT_BUDGET
from sam2_propagation.errors import PropagationError
from sam2_propagation.intensities import scale
from sam2_propagation.interface import Image, Propagation, Propagator, Support
from sam2_propagation.registration import affinely_aligned
from sam2_propagation.sam2_engine import Prompts, Sam2Engine, shows_slices
from sam2_propagation.sam2_settings import TURNED, Sam2Settings
from sam2_propagation.views import EVERY_PLANE, FLAT, VIEWS, can_show, natural_plane, present

_FEWEST_SLICES = 6
"""Along every axis for slices across each of them to show anything: the fewest that phantoms were measured with."""


class Sam2Propagator:
    """Carries labels by SAM2 (see `Sam2Settings.mode` for how).

    The model is loaded when it is first needed, so that a propagator can be sent to worker processes.

    Args:
        checkpoint: name or file (see `checkpoints`); the settings' own when None.
        config: configuration of a file that nothing else identifies.
        mode: overrides the settings' mode.
        device: "cpu", "cuda", "mps".
        adapt: fine-tuning steps on the annotated case before it is carried; 0 for none.
        prompter: whose labels prompt `self` mode, those of relays or registration as a rule,
            correspondence where no label is whole.
        batch_size: slices encoded, and (class, slice) pairs segmented, at once; lower it when memory runs out.
        seed: of insertion positions and adaptation.
        settings: everything else.
        budget: bytes of RAM for embeddings; beyond it they go to a temporary file.
        cache: folder of downloaded checkpoints.
        progress: called as work goes on, with the number of slices just encoded (in mode `sequence` also tracked) and
            how many these will be for a query (in mode `sequence` the whole set) in all its views.

    Attributes:
        keep_own: keep a query that is completed from its own sparse label encoded, since others draw on it too.

    Raises:
        PropagationError: from every method, for bad input: one sentence.
    """

    name = "sam2"

    def __init__(
        self,
        checkpoint: str | Path | None = None,
        config: str | Path | Config | None = None,
        mode: str | None = None,
        device: str = "cpu",
        adapt: int = 0,
        prompter: Propagator | None = None,
        batch_size: int = 8,
        seed: int = 0,
        settings: Sam2Settings | None = None,
        budget: int = DEFAULT_BUDGET,
        cache: Path | None = None,
        progress: Callable[[float, int], None] | None = None,
    ) -> None:
        chosen = settings or Sam2Settings()
        self.settings = chosen if mode is None else replace(chosen, mode=mode)
        self.checkpoint = self.settings.checkpoint if checkpoint is None else checkpoint
        self.default_views = self.settings.views
        self.views = (*self.default_views, *(view for view in VIEWS if view not in self.default_views))
        self.whole_set = self.settings.mode == "sequence"
        self._config = config
        self._device = device
        self._adapt = adapt
        self.prompter = prompter
        self._batch_size = batch_size
        self._seed = seed
        self._budget = budget
        self._cache = cache
        self.progress = progress
        self.keep_own = False
        self._shared: Path | None = None
        self._engine: Sam2Engine | None = None
        self._adapted: dict[str, torch.Tensor] | None = None
        if self.settings.mode == "self" and prompter is None:
            raise PropagationError("expected a propagator that prompts mode self, found none; give one or use retrieve")
        if adapt < 0:
            raise PropagationError(f"expected -adapt of 0 or more steps, found {adapt}; leave it out for none")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_engine": None}

    def prepare(self) -> None:
        """Fetch and load the checkpoint now, before anything is written and before workers do so all at once."""
        with _memory_errors(self._batch_size):
            self._ready()

    def check(self, supports: Sequence[Support], views: Sequence[str]) -> None:
        """Check that annotated images can be used as `adapt` and `propagate` would use them.

        Raises:
            PropagationError: as these.
        """
        usable = _usable(supports)
        for support in usable:
            scale(support.image, self.settings.intensities)
            for view in views:
                present(support.image, view, natural_plane(usable[0].image))
        if self._adapt:
            with _memory_errors(self._batch_size):
                self._ready().check_adaptation(usable, views)

    def fitting_views(self, supports: Sequence[Support]) -> tuple[str, ...]:
        """The default views for images like these.

        Three planes, which err differently, for volumes with slices enough along every axis, in modes that look at
        every slice by itself, sparse labels if a prompter completes them first. Otherwise turns in the natural plane,
        or in the one that all annotated slices lie in.
        """
        planes = self.settings.views == TURNED and self.settings.mode in (None, "self", "retrieve")
        prompted = self.prompter is not None and self.settings.mode != "retrieve"
        deep = all(min(s.image.shape) >= _FEWEST_SLICES and (prompted or not s.is_sparse) for s in supports)
        if planes and deep:
            return EVERY_PLANE
        return _turned_in(_drawn_plane(supports)) if self.default_views == TURNED else self.default_views

    def share(self, folder: Path | None) -> None:
        """Let processes that this is sent to share encoded supports in a folder that exists; None for no more."""
        self._shared = folder

    def adapt(self, supports: Sequence[Support], views: Sequence[str]) -> None:
        """Adapt to the annotated cases now; workers that the propagator is sent to afterwards need not do it again.

        Args:
            supports: annotated images.
            views: those that will be asked for.
        """
        if self._adapt == 0:
            return
        with _memory_errors(self._batch_size):
            engine = self._ready()
            engine.adapt(_usable(supports), views, self._adapt, self._seed)
        self._adapted = {key: value.detach().cpu() for key, value in engine.loaded.model.state_dict().items()}

    def describe(self) -> LoadedCheckpoint:
        """The checkpoint in use, loaded if need be: its name, sha256 and image size are for the record."""
        return self._ready().loaded

    def forget_supports(self) -> None:
        """Drop what is kept of supports; it is encoded anew when it is next needed."""
        if self._engine is not None:
            self._engine.forget_supports()

    def fit(self, images: Iterable[Image]) -> None:
        """Nothing is learnt from images without labels."""

    def propagate(
        self, supports: Sequence[Support], queries: Iterable[Image], views: Sequence[str]
    ) -> Iterator[Propagation]:
        """Yield one Propagation for each query and view, in the order given.

        Support slices are encoded once for all calls with the same supports, query slices once a view.

        Args:
            supports: annotated images; sparse labels only count where they speak, and those without foreground not.
            queries: images to label; one that is also a support with a sparse label is completed by mode `slice` and,
                where there is a prompter, then by mode `self`, prompted by both and by its slices registered to each
                other.
            views: names out of `views`.

        Raises:
            PropagationError: no support with foreground, views, channels or data that do not fit, or too little memory.
        """
        supports = _usable(supports)
        natural = natural_plane(supports[0].image)
        for view in views:
            for support in supports:
                present(support.image, view, natural)
        with _memory_errors(self._batch_size):
            engine = self._ready()
            engine.keep_own = self.keep_own
            if self._adapt and self._adapted is None:
                self.adapt(supports, views)
            if self.settings.mode == "sequence":
                yield from engine.sequence(supports, list(queries), views, self.progress or (lambda *_: None))
                return
            for query in queries:
                yield from self._one(engine, supports, query, views, natural)

    def _one(
        self, engine: Sam2Engine, supports: Sequence[Support], query: Image, views: Sequence[str], natural: str
    ) -> Iterator[Propagation]:
        prompts, scaled = Prompts(self.prompter, supports, query), scale(query, self.settings.intensities)
        if self.settings.align:
            supports = [affinely_aligned(support, query) for support in supports]
            engine.forget_supports()
        shown = [view for view in views if can_show(query, view, natural)]
        total = sum(query.shape[present(query, view, natural).axes[0]] for view in shown)
        for view in views:
            if view in shown:
                yield engine.carry(supports, query, scaled, view, natural, prompts, self._seed, self._told_of(total))
            else:
                yield Propagation(query.case, view, None, reason=FLAT)

    def _told_of(self, total: int) -> Callable[[int], None]:
        report = self.progress
        return (lambda _: None) if report is None else (lambda slices: report(slices, total))

    def _ready(self) -> Sam2Engine:
        if self._engine is None:
            loaded = load_checkpoint(self.checkpoint, self._config, self._device, self._cache)
            if self._adapted is not None:
                loaded.model.load_state_dict(self._adapted)
            shared = None if self.settings.align else self._shared
            prompted = self.prompter is not None
            self._engine = Sam2Engine(loaded, self.settings, self._batch_size, self._budget, prompted, shared)
        return self._engine


def _drawn_plane(supports: Sequence[Support]) -> str | None:
    """The plane of all sparse labels' slices, None where it is the natural one or there is no such plane."""
    supports = [support for support in supports if support.classes]
    drawn = [support for support in supports if support.is_sparse]
    if not drawn or len(drawn) < len(supports) or any(support.image.shape[0] == 1 for support in drawn):
        return None
    natural = natural_plane(drawn[0].image)
    planes = [natural, *(plane for plane in EVERY_PLANE if plane != natural)]
    found = next((p for p in planes if all(shows_slices(s, p, natural, everywhere=True) for s in drawn)), natural)
    return None if found == natural else found


def _turned_in(plane: str | None) -> tuple[str, ...]:
    return TURNED if plane is None else (plane, f"{plane}_rot90", f"{plane}_rot180")


def _usable(supports: Sequence[Support]) -> list[Support]:
    """Supports with foreground: from the others nothing can be carried."""
    if not supports:
        raise PropagationError("expected at least one annotated case, found none; annotate one")
    usable = [support for support in supports if support.classes]
    if not usable:
        raise PropagationError(
            f"expected foreground in the label of {', '.join(s.image.case for s in supports)}, found none; "
            "annotate a case that shows the structures"
        )
    return usable


_TOO_LITTLE_MEMORY = ("out of memory", "not enough memory", "can't allocate memory")
"""What torch says on GPUs, and on the CPU under Windows and Linux."""


@contextmanager
def _memory_errors(batch_size: int) -> Iterator[None]:
    """Too little memory is the user's to mend; torch has an error of its own for it on GPUs alone."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        plain = isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError)
        if plain and not any(words in str(error).lower() for words in _TOO_LITTLE_MEMORY):
            raise
        raise PropagationError(
            f"expected enough memory, found too little; lower -sam2_batch (it is {batch_size}) or -np, or use a "
            "smaller checkpoint; what is done is kept, and the same command goes on from there"
        ) from error
