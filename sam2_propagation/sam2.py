"""The sam2 propagator: labels carried to other images by SAM2's memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sam2_propagation.architecture import Config
from sam2_propagation.checkpoints import LoadedCheckpoint, check_device, load_checkpoint, prepare_checkpoint
from sam2_propagation.embeddings import DEFAULT_BUDGET
from sam2_propagation.errors import PropagationError
from sam2_propagation.intensities import scale
from sam2_propagation.interface import Image, Propagation, Propagator, Support
from sam2_propagation.sam2_engine import Prompts, Sam2Engine
from sam2_propagation.sam2_settings import Sam2Settings
from sam2_propagation.views import VIEWS, natural_plane, present


class Sam2Propagator:
    """Carries labels by SAM2 (see `Sam2Settings.mode` for how).

    The model is loaded when it is first needed, so that a propagator can be sent to worker processes.

    Args:
        checkpoint: name or file (see `checkpoints`); the settings' own when None.
        config: configuration of a file that nothing else identifies.
        mode: overrides the settings' mode.
        device: "cpu", "cuda", "mps".
        adapt: fine-tuning steps on the annotated case before it is carried; 0 for none.
        prompter: whose labels prompt `self` mode, registration as a rule.
        batch_size: slices encoded, and (class, slice) pairs segmented, at once; lower it when memory runs out.
        seed: of insertion positions and adaptation.
        settings: everything else.
        budget: bytes of RAM for embeddings; beyond it they go to a temporary file.
        cache: folder of downloaded checkpoints.
        progress: called whenever slices of a query were encoded, with their number and that of all its views together.

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
        progress: Callable[[int, int], None] | None = None,
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
        self._engine: Sam2Engine | None = None
        self._adapted: dict[str, torch.Tensor] | None = None
        if self.settings.mode == "self" and prompter is None:
            raise PropagationError("expected a propagator that prompts mode self, found none; give one or use retrieve")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_engine": None}

    def prepare(self) -> None:
        """Check the device and fetch the checkpoint, before workers are started that would all do so at once."""
        check_device(self._device)
        prepare_checkpoint(self.checkpoint, self._cache)

    def adapt(self, supports: Sequence[Support], views: Sequence[str]) -> None:
        """Adapt to the annotated cases now; workers that the propagator is sent to afterwards need not do it again.

        Args:
            supports: annotated images.
            views: those that will be asked for.
        """
        if self._adapt == 0:
            return
        engine = self._ready()
        engine.adapt(supports, views, self._adapt, self._seed)
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
            supports: annotated images, of which sparse labels only count where they speak.
            queries: images to label; one that is also a support with a sparse label is completed by mode `slice`.
            views: names out of `views`.

        Raises:
            PropagationError: no support, a support without foreground, views or data that do not fit the mode, or too
                little memory.
        """
        _check_supports(supports)
        natural = natural_plane(supports[0].image)
        for view in views:
            for support in supports:
                present(support.image, view, natural)
        with _memory_errors():
            engine = self._ready()
            if self._adapt and self._adapted is None:
                self.adapt(supports, views)
            if self.settings.mode == "sequence":
                yield from engine.sequence(supports, list(queries), views)
                return
            for query in queries:
                yield from self._one(engine, supports, query, views, natural)

    def _one(
        self, engine: Sam2Engine, supports: Sequence[Support], query: Image, views: Sequence[str], natural: str
    ) -> Iterator[Propagation]:
        prompts, scaled = Prompts(self.prompter, supports, query), scale(query, self.settings.intensities)
        total = sum(query.shape[present(query, view, natural).axes[0]] for view in views)
        for view in views:
            yield engine.carry(supports, query, scaled, view, natural, prompts, self._seed, self._told_of(total))

    def _told_of(self, total: int) -> Callable[[int], None]:
        report = self.progress
        return (lambda _: None) if report is None else (lambda slices: report(slices, total))

    def _ready(self) -> Sam2Engine:
        if self._engine is None:
            loaded = load_checkpoint(self.checkpoint, self._config, self._device, self._cache)
            if self._adapted is not None:
                loaded.model.load_state_dict(self._adapted)
            self._engine = Sam2Engine(loaded, self.settings, self._batch_size, self._budget, self.prompter is not None)
        return self._engine


def _check_supports(supports: Sequence[Support]) -> None:
    if not supports:
        raise PropagationError("expected at least one annotated case, found none; annotate one")
    for support in supports:
        if not support.classes:
            raise PropagationError(
                f"expected foreground in the label of {support.image.case}, found none; annotate another case"
            )


@contextmanager
def _memory_errors() -> Iterator[None]:
    """Too little memory is the user's to mend; torch has its own error for GPUs and a RuntimeError for the CPU."""
    advice = "expected enough memory, found too little; lower the batch size, or use a smaller checkpoint"
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise PropagationError(advice) from error
    except RuntimeError as error:
        if "not enough memory" not in str(error):
            raise
        raise PropagationError(advice) from error
