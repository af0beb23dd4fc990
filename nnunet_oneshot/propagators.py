"""The propagators by name, set up from a command's options."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TypeVar

from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.store import Source
from sam2_propagation.correspondence import CorrespondencePropagator
from sam2_propagation.correspondence_training import Recipe
from sam2_propagation.intensities import Intensities
from sam2_propagation.interface import Propagator, Support
from sam2_propagation.registration import RegistrationPropagator
from sam2_propagation.relay import RelayPropagator
from sam2_propagation.sam2 import Sam2Propagator
from sam2_propagation.sam2_settings import Sam2Settings, recipe

Number = TypeVar("Number", int, float)

NAMES = ("registration", "relay", "sam2", "correspondence")
RECIPE = Recipe()
"""How the network of `correspondence` is trained."""
DEFAULT = ("registration", "relay", "sam2")
"""Fused, they were better than registration alone on three real sets and worse on the fourth, ultrasound; for each set
the mean over the others asks for SAM2 (benchmarks/builtin_checkpoint.py), and phantoms ask for relays."""
RECIPES = {"yoloseg": "sam2", "ssl_medsam2": "sam2", "oneseg": "correspondence"}
"""Published procedures, and the propagator that each sets up and that carries its labels alone."""
DEFAULT_OF_SLICES = ("correspondence", "sam2")
"""In place of `DEFAULT` where people drew on some slices alone: together they carry these best, see
benchmarks/oneseg.py and slice_fusion.py."""
NEEDS_WHOLE_LABEL = ("registration", "relay")
"""Propagators that can only start from a case whose every voxel is labelled."""
REVERSIBLE = ("registration",)
"""Propagators whose labels are carried back for a reverse check; `relay` does so unasked."""


@dataclass(frozen=True)
class PropagatorOptions:
    """Options of `propagate` that say how propagators are set up.

    Attributes:
        device: cpu, cuda or mps.
        checkpoint, config: SAM2 weights and, for a file that nothing else identifies, its configuration.
        mode: of the sam2 propagator; the one that fits the data when None.
        adapt: fine-tuning steps of SAM2 on warps of the annotated case before it is carried.
        recipe: a published procedure, one of `RECIPES`.
        window: what sam2 sees of the intensities, a name of `CT_WINDOWS` or "LOW HIGH"; percentiles when None.
        channels: which channels sam2 sees, "0", "2 0 1" (red, green and blue) or "mean"; its own choice when None.
        batch_size: slices that sam2 works on at once.
        reverse_check: carry each label back to the annotated case too, which tells how far it can be trusted.
    """

    device: str = "cpu"
    checkpoint: str | None = None
    config: str | None = None
    mode: str | None = None
    adapt: int = 0
    recipe: str | None = None
    window: str | None = None
    channels: str | None = None
    batch_size: int = 8
    reverse_check: bool = False

    def settings(self) -> dict[str, str | int]:
        """What decides the labels, for the manifest; how they are computed does not."""
        return {key: value for key, value in asdict(self).items() if value and key not in ("device", "batch_size")}


def default_names(recipe: str | None) -> list[str]:
    """What carries labels unless told otherwise.

    Raises:
        OneShotError: an unknown recipe.
    """
    if recipe is None:
        return list(DEFAULT)
    if recipe not in RECIPES:
        raise OneShotError(f"expected a recipe of {', '.join(RECIPES)}, found {recipe!r}; choose one of those")
    return [RECIPES[recipe]]


def fitting_names(names: Sequence[str], supports: Sequence[Support]) -> tuple[list[str], list[str]]:
    """The propagators that can start from annotated images like these, and what a user should know of the others.

    Where no image is wholly labelled, the default gives way to `DEFAULT_OF_SLICES`, and of other choices those that
    need a whole label are left out: they would fail in every case, and where most views failed a case gets no label.

    Raises:
        OneShotError: none of them can.
    """
    if _any_whole(supports):
        return list(names), []
    if tuple(names) == DEFAULT:
        instead = " and ".join(DEFAULT_OF_SLICES)
        return list(DEFAULT_OF_SLICES), [f"no annotated image is labelled in every slice: {instead} carry the labels"]
    fitting = [name for name in names if name not in NEEDS_WHOLE_LABEL]
    if not fitting:
        raise OneShotError(
            f"expected an annotated case whose every voxel is labelled for {', '.join(names)}, found sparse "
            "labels alone; add -propagator sam2, which starts from single slices, or complete one label"
        )
    left = [name for name in names if name not in fitting]
    return fitting, [f"{name} needs a whole label, and there is none: it is left out" for name in left]


def _any_whole(supports: Sequence[Support]) -> bool:
    """Whether there is a label of every voxel that shows something: registration can start from no other."""
    return any(support.classes and not support.is_sparse for support in supports)


def check_options(names: Sequence[str], options: PropagatorOptions) -> None:
    """OneShotError where an option cannot act: it is of a propagator, or a recipe, that is not asked for."""
    _check_recipe(names, options.recipe)
    of_sam2 = {
        "-sam2_chk": options.checkpoint,
        "-sam2_cfg": options.config,
        "-mode": options.mode,
        "-window": options.window,
        "-channels": options.channels,
        "-adapt": options.adapt,
    }
    _check_owner(names, [flag for flag, value in of_sam2.items() if value], ("sam2",))
    _check_owner(names, ["--reverse_check"] if options.reverse_check else [], REVERSIBLE)


def _check_owner(names: Sequence[str], flags: Sequence[str], owners: Sequence[str]) -> None:
    if flags and not set(names) & set(owners):
        raise OneShotError(
            f"expected -propagator {' or '.join(owners)} with {' '.join(flags)}, found {' '.join(names)}, for which "
            f"that does nothing; add {owners[0]} or leave {' '.join(flags)} out"
        )


def _check_recipe(names: Sequence[str], recipe: str | None) -> None:
    if recipe is not None and list(names) != (own := default_names(recipe)):
        raise OneShotError(
            f"expected {own[0]} alone with recipe {recipe}, found {' '.join(names)}; leave -propagator or -recipe out"
        )


def make_propagator(name: str, options: PropagatorOptions) -> Propagator:
    """The propagator of that name; `prepare` loads its weights.

    Raises:
        OneShotError: an unknown name.
        PropagationError: a mode or recipe that cannot be had.
    """
    if name == "registration":
        return RegistrationPropagator()
    if name == "relay":
        return RelayPropagator()
    if name == "sam2":
        return _sam2(options)
    if name == "correspondence":
        return CorrespondencePropagator(options.device, RECIPE)
    raise OneShotError(f"expected a propagator of {', '.join(NAMES)}, found {name!r}; choose one of those")


def make_propagators(
    names: Sequence[str], options: PropagatorOptions, supports: Sequence[Support]
) -> dict[str, Propagator]:
    """The propagators of those names, each once, and what prompts SAM2.

    That is registration, asked for or not; where relays are asked for, their vote (`propagate` sees to that). Where no
    image is wholly labelled these have nothing to start from: correspondence prompts if it is asked for, else nothing.

    Raises:
        OneShotError: mode self with nothing that prompts; and, like PropagationError, as of `make_propagator`.
    """
    made = {name: make_propagator(name, options) for name in dict.fromkeys(names)}
    if "relay" in made and "registration" not in made:
        raise OneShotError(
            f"expected registration beside relay, which carries its labels on, found {' '.join(made)}; "
            "add -propagator registration relay"
        )
    sam2 = made.get("sam2")
    if isinstance(sam2, Sam2Propagator) and sam2.prompter is not None and not _any_whole(supports):
        sam2.prompter = made.get("correspondence")
        if sam2.prompter is None and sam2.settings.mode == "self":
            raise OneShotError(
                "expected something that prompts mode self, a wholly labelled case or correspondence too, found "
                "sparse labels and sam2 alone; add -propagator correspondence sam2 or use -mode slice"
            )
    return made


def prepare(propagators: Iterable[Propagator]) -> None:
    """Load weights now, before anything is written and before workers do so all at once.

    Raises:
        PropagationError: a checkpoint or device that cannot be had.
    """
    for propagator in propagators:
        if isinstance(propagator, Sam2Propagator):
            propagator.prepare()


def describe(propagator: Propagator, options: PropagatorOptions) -> Source:
    """The manifest's record of a propagator that has run."""
    if isinstance(propagator, CorrespondencePropagator):
        return Source(settings=asdict(propagator.recipe))
    if not isinstance(propagator, Sam2Propagator):
        return Source()
    loaded = propagator.describe()
    return Source(settings=options.settings(), checkpoint=loaded.name, sha256=loaded.sha256)


def _sam2(options: PropagatorOptions) -> Sam2Propagator:
    if options.batch_size < 1:
        raise OneShotError(f"expected -sam2_batch of 1 or more, found {options.batch_size}; leave it out")
    published = None if options.recipe is None else recipe(options.recipe)
    settings = published or Sam2Settings()
    return Sam2Propagator(
        options.checkpoint,
        options.config,
        mode=options.mode,
        device=options.device,
        adapt=options.adapt,
        # A published procedure knows of no other propagator.
        prompter=RegistrationPropagator() if published is None else None,
        batch_size=options.batch_size,
        settings=replace(settings, intensities=_intensities(options, settings.intensities)),
    )


def _intensities(options: PropagatorOptions, own: Intensities) -> Intensities:
    """Those of the options, else sam2's own."""
    if options.window is not None:
        words = options.window.split()
        limits = _numbers(words, float, "-window", "a name or two numbers, the lower first")
        if limits is not None and (len(limits) != 2 or limits[0] >= limits[1]):
            raise OneShotError(
                f"expected two numbers for -window, the lower first, found {options.window}; correct them"
            )
        own = replace(own, window=options.window if limits is None else (limits[0], limits[1]))
    if options.channels is not None:
        indices = _numbers(options.channels.split(), int, "-channels", "mean, one number or three")
        own = replace(own, channels=options.channels if indices is None else tuple(indices))
    return own


def _numbers(words: Sequence[str], kind: type[Number], flag: str, expected: str) -> list[Number] | None:
    """The words as numbers, or None for a single word that is none."""
    try:
        return [kind(word) for word in words]
    except ValueError as error:
        if len(words) == 1:
            return None
        raise OneShotError(f"expected {expected} for {flag}, found {' '.join(words)}; correct it") from error


def self_prompted(options: PropagatorOptions, prompter: Propagator) -> Sam2Propagator:
    """SAM2 in `self` mode, prompted by whatever labels there are.

    Raises:
        OneShotError: a window or channels that nobody knows.
        PropagationError: weights or a device that cannot be had.
    """
    propagator = _sam2(replace(options, mode="self"))
    propagator.prompter = prompter
    propagator.prepare()
    return propagator


def _default_views(propagator: Propagator, supports: Sequence[Support]) -> tuple[str, ...]:
    return propagator.fitting_views(supports) if isinstance(propagator, Sam2Propagator) else propagator.default_views


def choose_views(
    propagators: Mapping[str, Propagator], wanted: Sequence[str] | None, supports: Sequence[Support]
) -> dict[str, tuple[str, ...]]:
    """The views of each propagator: its defaults for annotated images like these, or those of `wanted` that it offers.

    Raises:
        OneShotError: a view that no chosen propagator offers, or a propagator left without one.
    """
    if wanted is None:
        return {name: _default_views(propagator, supports) for name, propagator in propagators.items()}
    offered = {name: propagator.views for name, propagator in propagators.items()}
    for view in wanted:
        if not any(view in views for views in offered.values()):
            raise OneShotError(f"expected views of {offered}, found {view!r}; choose among those")
    chosen = {name: tuple(v for v in views if v in wanted) for name, views in offered.items()}
    for name, views in chosen.items():
        if not views:
            raise OneShotError(
                f"expected at least one view of {name}, {offered[name]}, found none in {list(wanted)}; "
                f"add one, leave -views out, or name by -propagator what carries the labels without {name}"
            )
    return chosen
