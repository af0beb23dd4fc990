"""What a refinement is told to differ in, and how a command repeats it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Answer
from fake_propagator import FakePropagator

from nnunet_oneshot import cli, command_line
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.output import find_output
from nnunet_oneshot.propagate import propagate
from nnunet_oneshot.refine_record import Plan, Record, make_plan
from nnunet_oneshot.review.session import Reviewed
from nnunet_oneshot.store import Store
from nnunet_oneshot.summary import review_summary

BEGUN = make_plan("2d", preset="small", warm_start=True)


@pytest.fixture
def store(toy: Path, fakes: dict[str, FakePropagator]) -> Store:
    propagate(501, 601, propagators=("fake",), num_processes=1)
    return find_output(501, 601)


def begin(store: Store, plan: Plan) -> Record:
    record = Record(store)
    record.begin(plan)
    record.mark("train-0")
    return record


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (make_plan("2d", warm_start=True), "-preset small, found -preset default;"),
        (dataclasses.replace(BEGUN, configuration="3d_lowres"), "-c 2d, found -c 3d_lowres;"),
        (dataclasses.replace(BEGUN, trainer="Mine", plans="Own"), "no -tr, no -p, found -tr Mine, -p Own;"),
        (dataclasses.replace(BEGUN, warm_start=False), "no --from_scratch, found --from_scratch;"),
        (
            dataclasses.replace(BEGUN, self_opinion="builtin", min_margin=0.2),
            "-min_margin 0, -self_opinion none, found -min_margin 0.2, -self_opinion builtin;",
        ),
    ],
)
def test_another_refinement_is_told_what_differs_as_flags(store: Store, asked: Plan, said: str) -> None:
    record = begin(store, BEGUN)
    with pytest.raises(OneShotError) as caught:
        record.begin(asked)
    assert f"expected the refinement that was begun there, {said} repeat those settings, or" in str(caught.value)


def test_what_a_training_that_never_ended_was_told_is_repeated_whole(store: Store) -> None:
    """Nothing of it is taken from the record yet: the training would be set aside."""
    Record(store).begin(BEGUN)
    last = review_summary(Reviewed(store.folder.name, 0, {}), 601)["lines"][-1]
    assert last == "next: nnUNetv2_oneshot_refine -d 601 -c 2d -preset small -self_opinion none -rounds 1"


@pytest.mark.parametrize(
    ("plan", "command"),
    [
        (BEGUN, "nnUNetv2_oneshot_refine -d 601 -c 2d -preset small -rounds 3"),
        (make_plan("3d_fullres", self_opinion="builtin"), "nnUNetv2_oneshot_refine -d 601 -c 3d_fullres -rounds 3"),
        (
            make_plan("2d", "Mine", "Own", num_folds=3, weight_by_quality=True),
            "nnUNetv2_oneshot_refine -d 601 -c 2d -tr Mine -p Own -num_folds 3 --weight_by_quality -rounds 3",
        ),
        (None, "nnUNetv2_oneshot_refine -d 601 -c CONFIG -preset small -rounds 3"),
    ],
)
def test_review_ends_with_a_command_that_goes_on(
    store: Store, call: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch, plan: Plan | None, command: str
) -> None:
    monkeypatch.setattr(command_line, "_best_device", lambda: "cpu")
    if plan is not None:
        begin(store, plan)
    assert review_summary(Reviewed(store.folder.name, 2, {}), 601)["lines"][-1] == f"next: {command}"
    if plan is None:
        return
    seen: list[Plan] = []

    def refine(dataset: str, configuration: str, **more: object) -> None:
        wanted = {f.name: more[f.name] for f in dataclasses.fields(Plan) if f.name in more}
        seen.append(make_plan(configuration, **wanted))
        raise KeyboardInterrupt

    monkeypatch.setattr("nnunet_oneshot.refine.refine", refine)
    call(cli.refine, *command.split()[1:], "-device", "cpu")
    # Those two are taken from the record where nobody names them.
    assert dataclasses.replace(seen[0], warm_start=plan.warm_start, self_opinion=plan.self_opinion) == plan
