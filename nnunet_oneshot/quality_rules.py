"""Constants of the quality rules, written by `python benchmarks/quality.py learn` from phantoms; not edited by hand."""

from __future__ import annotations

FITTED: dict[tuple[str, ...], tuple[float, ...]] = {
    ("views",): (-2.256, 1.495),
    ("change",): (0.245, 1.002),
    ("reverse",): (-0.182, 1.122),
    ("views", "change"): (0.392, 0.972, 0.0),
    ("views", "reverse"): (-0.182, 0.0, 1.122),
    ("change", "reverse"): (-0.336, 0.863, 0.435),
    ("views", "change", "reverse"): (-0.204, 0.832, 0.0, 0.436),
}
"""By kinds of evidence: the bias, then the weight of each kind."""
