"""The reverse check while labels are propagated."""

from __future__ import annotations

import pytest
from fake_propagator import FakePropagator
from raw_datasets import Roots, write_raw

from nnunet_oneshot import propagate as propagate_module
from nnunet_oneshot import propagators
from nnunet_oneshot.propagate import propagate
from nnunet_oneshot.propagators import PropagatorOptions


def test_the_reverse_check_is_kept_with_each_view_and_counts(
    roots: Roots, fakes: dict[str, FakePropagator], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked of those alone whose labels can be carried back."""
    for module in (propagate_module, propagators):
        monkeypatch.setattr(module, "REVERSIBLE", ("fake",))
    write_raw(roots.raw)
    options = PropagatorOptions(reverse_check=True)
    outcome = propagate(501, 601, propagators=("fake", "other"), views=("still",), options=options, num_processes=1)
    assert outcome.manifest is not None
    record = outcome.store.read_worker("fake", "case_1")
    other = outcome.store.read_worker("other", "case_1")
    assert record is not None
    assert other is not None
    assert record.views["still"].scores == {"similarity": 0.5, "reverse_dice_1": 1.0, "reverse_dice_2": 1.0}
    assert other.views["still"].scores == {"similarity": 0.5}
    assert outcome.manifest.cases["case_1"].quality is not None
