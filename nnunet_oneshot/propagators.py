"""The propagators by name, set up from a command's options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nnunet_oneshot.errors import OneShotError
from sam2_propagation.interface import Propagator
from sam2_propagation.registration import RegistrationPropagator

NAMES = ("registration",)
PLANNED = {"correspondence": "the self-learned slice correspondence of OneSeg"}


@dataclass(frozen=True)
class PropagatorOptions:
    """Options of `propagate` that say how propagators are set up."""

    device: str = "cpu"


def make_propagator(name: str, options: PropagatorOptions) -> Propagator:
    """The propagator of that name; OneShotError for an unknown one."""
    if name == "registration":
        return RegistrationPropagator()
    if name in PLANNED:
        raise OneShotError(
            f"expected a propagator of {', '.join(NAMES)}, found {name}, which this version does not "
            f"have yet ({PLANNED[name]}); choose one of those"
        )
    raise OneShotError(f"expected a propagator of {', '.join(NAMES)}, found {name!r}; choose one of those")


def choose_views(propagators: Mapping[str, Propagator], wanted: Sequence[str] | None) -> dict[str, tuple[str, ...]]:
    """The views of each propagator: its defaults, or those of `wanted` that it offers.

    Raises:
        OneShotError: a view that no chosen propagator offers, or a propagator left without one.
    """
    if wanted is None:
        return {name: propagator.default_views for name, propagator in propagators.items()}
    offered = {name: propagator.views for name, propagator in propagators.items()}
    for view in wanted:
        if not any(view in views for views in offered.values()):
            raise OneShotError(f"expected views of {offered}, found {view!r}; choose among those")
    chosen = {name: tuple(v for v in views if v in wanted) for name, views in offered.items()}
    for name, views in chosen.items():
        if not views:
            raise OneShotError(
                f"expected at least one view of {name}, {offered[name]}, found none in {list(wanted)}; "
                "add one or leave -views out"
            )
    return chosen
