"""Registration's labels prompt SAM2 where both are asked for: carried once, fused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from fake_propagator import FakePropagator
from raw_datasets import Roots, label_array, read, write_raw

from nnunet_oneshot import propagate as stage
from nnunet_oneshot.dataset import open_dataset
from nnunet_oneshot.prompting import CarriedLabels
from nnunet_oneshot.propagate import propagate
from nnunet_oneshot.store import Store
from sam2_propagation.interface import Propagator
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


def test_registration_is_run_once_for_both(roots: Roots, monkeypatch: pytest.MonkeyPatch) -> None:
    write_raw(roots.raw, cases=("case_0", "case_1"))
    registration, unasked = FakePropagator("registration"), FakePropagator("unasked")
    sam2 = Sam2Propagator(prompter=unasked)
    made: dict[str, Propagator] = {"registration": registration, "sam2": sam2}
    monkeypatch.setattr(stage, "make_propagator", lambda name, _: made[name])
    views = ("still", "shifted", "identity")
    store = propagate(501, 601, propagators=("sam2", "registration"), views=views, num_processes=1).store
    assert registration.asked == ["case_1"]
    assert unasked.asked == []
    found: Path = store.view_path("sam2", "identity", "case_1")
    assert read(found).any(), "SAM2 did not follow the prompts"
