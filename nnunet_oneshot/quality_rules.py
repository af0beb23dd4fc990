"""Constants of the quality rules, which `python benchmarks/quality.py learn` writes from made-up sets."""

from __future__ import annotations

FITTED: dict[tuple[str, ...], tuple[float, ...]] = {
    ("views",): (-2.637, 1.582),
    ("sources",): (-1.601, 1.903),
    ("change",): (-0.047, 1.428),
    ("reverse",): (-0.321, 1.094),
    ("views", "sources"): (-2.449, 1.37, 0.628),
    ("views", "change"): (0.001, 1.472, 0.064),
    ("views", "reverse"): (-0.321, 0.0, 1.094),
    ("sources", "change"): (-1.088, 0.731, 0.913),
    ("sources", "reverse"): (-0.641, 0.444, 1.062),
    ("sources", "confidence"): (-1.273, 1.139, 1.037),
    ("change", "reverse"): (-0.253, 1.272, 0.255),
    ("views", "sources", "change"): (-1.088, 0.0, 0.731, 0.913),
    ("views", "sources", "reverse"): (-0.965, 0.502, 0.0, 1.041),
    ("views", "sources", "confidence"): (-1.273, 0.0, 1.139, 1.037),
    ("views", "change", "reverse"): (-0.21, 0.627, 0.696, 0.236),
    ("sources", "change", "reverse"): (-0.941, 0.558, 0.877, 0.12),
    ("sources", "change", "confidence"): (-0.671, 0.044, 0.922, 0.765),
    ("sources", "reverse", "confidence"): (-0.45, 0.026, 0.892, 0.812),
    ("views", "sources", "change", "reverse"): (-0.941, 0.0, 0.558, 0.877, 0.12),
    ("views", "sources", "change", "confidence"): (-0.531, 0.518, 0.0, 0.486, 0.791),
    ("views", "sources", "reverse", "confidence"): (-0.45, 0.0, 0.026, 0.892, 0.812),
    ("sources", "change", "reverse", "confidence"): (-0.644, 0.035, 0.912, 0.049, 0.676),
    ("views", "sources", "change", "reverse", "confidence"): (-0.535, 0.42, 0.0, 0.561, 0.045, 0.705),
}
"""By kinds of evidence: the bias, then the weight of each kind."""
