"""Constants of the quality rules, which `python benchmarks/quality.py learn` writes from made-up sets."""

from __future__ import annotations

FITTED: dict[tuple[str, ...], tuple[float, ...]] = {
    ("views",): (-2.637, 1.582),
    ("sources",): (-1.601, 1.903),
    ("change",): (0.059, 1.152),
    ("reverse",): (-0.321, 1.094),
    ("views", "sources"): (-2.449, 1.37, 0.628),
    ("views", "change"): (-0.024, 0.104, 1.065),
    ("views", "reverse"): (-0.321, 0.0, 1.094),
    ("sources", "change"): (-1.027, 0.836, 0.818),
    ("sources", "reverse"): (-0.641, 0.444, 1.062),
    ("sources", "confidence"): (-1.273, 1.139, 1.037),
    ("change", "reverse"): (-0.4, 0.699, 0.67),
    ("views", "sources", "change"): (-1.143, 0.358, 0.815, 0.608),
    ("views", "sources", "reverse"): (-0.965, 0.502, 0.0, 1.041),
    ("views", "sources", "confidence"): (-1.273, 0.0, 1.139, 1.037),
    ("views", "change", "reverse"): (-0.625, 0.221, 0.489, 0.741),
    ("sources", "change", "reverse"): (-0.902, 0.764, 0.634, 0.235),
    ("sources", "change", "confidence"): (-0.589, 0.0, 0.76, 1.182),
    ("sources", "reverse", "confidence"): (-0.45, 0.026, 0.892, 0.812),
    ("views", "sources", "change", "reverse"): (-0.858, 0.526, 0.278, 0.412, 0.419),
    ("views", "sources", "change", "confidence"): (-0.78, 0.346, 0.0, 0.584, 1.159),
    ("views", "sources", "reverse", "confidence"): (-0.45, 0.0, 0.026, 0.892, 0.812),
    ("sources", "change", "reverse", "confidence"): (-0.481, 0.0, 0.615, 0.179, 1.078),
    ("views", "sources", "change", "reverse", "confidence"): (-0.75, 0.473, 0.0, 0.433, 0.332, 0.605),
}
"""By kinds of evidence: the bias, then the weight of each kind."""
