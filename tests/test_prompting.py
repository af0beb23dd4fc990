"""Labels that another propagator carried prompt SAM2 where both are asked for: carried once, fused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from fake_propagator import FakePropagator
from raw_datasets import Roots, label_array, make_sparse, read, write_raw

from nnunet_oneshot.dataset import open_dataset
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.prompting import CarriedLabels
from nnunet_oneshot.propagate import propagate
from nnunet_oneshot.propagators import PropagatorOptions, make_propagators
from nnunet_oneshot.store import Store
from sam2_propagation.interface import Image, Propagator, Support
from sam2_propagation.sam2 import Sam2Propagator


def _carried(store: Store, case: str) -> np.ndarray | None:
    dataset = open_dataset(501)
    image = dataset.read_image(next(c for c in dataset.cases if c.name == case))
    found = next(iter(CarriedLabels(dataset, store, "fake").propagate([], [image], ("fused",))))
    assert (found.label is None) == (found.reason is not None)
    return found.label


def test_prompts_are_the_majority_of_the_views(roots: Roots, fakes: dict[str, FakePropagator]) -> None:
    write_raw(roots.raw, cases=("case_0", "case_1"))
    store = propagate(501, 601, propagators=("fake",), views=("still", "shifted", "spare"), num_processes=1).store
    label = _carried(store, "case_1")
    assert label is not None
    np.testing.assert_array_equal(label, label_array(0))  # two of three views say so


@pytest.mark.parametrize("case", ["bad_1", "half_1"])
def test_no_prompt_where_most_views_failed(roots: Roots, fakes: dict[str, FakePropagator], case: str) -> None:
    write_raw(roots.raw, cases=("case_0", case))
    store = propagate(501, 601, propagators=("fake",), views=("still", "shifted"), num_processes=1).store
    assert _carried(store, case) is None


@pytest.mark.parametrize("sparse", [False, True])
def test_what_prompts_is_carried_once_for_both(roots: Roots, monkeypatch: pytest.MonkeyPatch, sparse: bool) -> None:
    """Registration, or where no image is wholly labelled correspondence."""
    dataset = write_raw(roots.raw, cases=("case_0", "case_1"))
    first = "correspondence" if sparse else "registration"
    if sparse:
        make_sparse(dataset)
    prompting, unasked = FakePropagator(first), FakePropagator("registration")
    sam2 = Sam2Propagator(prompter=unasked)
    made: dict[str, Propagator] = {first: prompting, "sam2": sam2}
    monkeypatch.setattr("nnunet_oneshot.propagators.make_propagator", lambda name, _: made[name])
    # Without a prompt SAM2 would look at supports instead.
    monkeypatch.setattr("sam2_propagation.sam2_engine.retrieve", None)
    views = ("still", "shifted", "identity")
    store = propagate(501, 601, propagators=("sam2", first), views=views, num_processes=1).store
    assert prompting.asked == (["case_0", "case_1"] if sparse else ["case_1"])
    assert unasked.asked == []
    assert isinstance(sam2.prompter, CarriedLabels)
    found: Path = store.view_path("sam2", "identity", "case_1")
    assert read(found).any(), "SAM2 did not follow the prompts"


def test_mode_self_is_refused_where_nothing_prompts(roots: Roots) -> None:
    make_sparse(write_raw(roots.raw, cases=("case_0", "case_1")))
    with pytest.raises(OneShotError, match="correspondence sam2"):
        propagate(501, 601, propagators=("sam2",), options=PropagatorOptions(mode="self"), num_processes=1)


def test_nothing_prompts_where_there_is_nothing_to_start_from() -> None:
    label = np.full((6, 8, 8), 2, np.int16)
    label[3], label[3, 3:5, 3:5] = 0, 1
    support = Support(Image("a", np.zeros((1, 6, 8, 8), np.float32)), label, 2)
    whole = Support(support.image, np.where(label == 2, 0, label).astype(np.int16), 2)
    empty = Support(support.image, np.zeros_like(label), 2)
    for names, supports, name in (
        (["sam2"], [support], None),
        (["sam2", "correspondence"], [support], "correspondence"),
        (["sam2", "correspondence"], [support, whole], "registration"),
        (["sam2", "correspondence"], [support, empty], "correspondence"),
    ):
        sam2 = make_propagators(names, PropagatorOptions(), supports)["sam2"]
        assert isinstance(sam2, Sam2Propagator)
        assert (sam2.prompter and sam2.prompter.name) == name
