"""Constants of the quality rules, written by `python benchmarks/quality.py learn` from phantoms; not edited by hand."""

from __future__ import annotations

FITTED: dict[tuple[str, ...], tuple[float, ...]] = {
    ("views",): (0.0, 1.0),
    ("change",): (0.0, 1.0),
    ("reverse",): (0.0, 1.0),
}
"""By kinds of evidence: the bias, then the weight of each kind."""
