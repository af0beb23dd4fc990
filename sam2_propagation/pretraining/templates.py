"""Kinds of anatomy, each a function that draws an ordered list of parts.

None copies a real data set: they are families of arrangements (organs in a body, chambers with walls, a long structure
in two pieces, a mosaic, a shell, layers) whose every number is drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from sam2_propagation.pretraining.parts import NO_CUT, Part

Rng = np.random.Generator


def draw_parts(rng: Rng) -> tuple[Part, ...]:
    """The parts of a new anatomy of a random kind."""
    names = list(TEMPLATES)
    weights = np.array([TEMPLATES[n][1] for n in names])
    name = names[int(rng.choice(len(names), p=weights / weights.sum()))]
    return tuple(TEMPLATES[name][0](rng))


def organs(rng: Rng) -> list[Part]:
    """A body on air (or none) with organs, look-alike pairs, nested parts, vessels and tiny parts."""
    parts = _body(rng)
    for _ in range(int(rng.integers(3, 8))):
        organ = _blob(rng, *_log_uniform(rng, 0.1, 0.42, 2), group=len(parts), tone=len(parts))
        parts.append(organ)
        draw = rng.random()
        if draw < 0.25:
            parts.append(_inside(rng, organ, rng.uniform(0.35, 0.85), tone=len(parts)))
        elif draw < 0.45:
            parts.append(replace(organ, x=-organ.x, angle=-organ.angle, group=len(parts)))
    return parts + _small_parts(rng, len(parts), int(rng.integers(1, 5)))


def chambers(rng: Rng) -> list[Part]:
    """A thick-walled round chamber beside a crescent, with the dark and bright surroundings of a chest."""
    parts = _body(rng, share=0.7)
    parts += [_blob(rng, *_log_uniform(rng, 0.2, 0.5, 2), group=len(parts) + i, tone=50) for i in range(2)]
    size, turn, group = float(np.exp(rng.uniform(np.log(0.13), np.log(0.5)))), rng.uniform(0, 2 * np.pi), len(parts)
    x, y = rng.uniform(-0.35, 0.35, 2)
    lean = rng.normal(0, 0.06, 2)
    base = Part(x, y, rng.uniform(-0.2, 0.2), size, size * rng.uniform(0.8, 1.2), rng.uniform(0.8, 1.6), group=group)
    base = replace(base, angle=rng.uniform(0, np.pi), lean_x=lean[0], lean_y=lean[1], rough=0.05, tone=group)
    crescent = _crescent(rng, base, turn)
    inner = rng.uniform(0.45, 0.82)
    cavity = replace(base, rx=base.rx * inner, ry=base.ry * inner, rz=base.rz * 0.9, rough=0.08, tone=group + 2)
    if rng.random() < 0.6:
        cavity = replace(cavity, tone=crescent.tone)
    if rng.random() < 0.4:
        grown = rng.uniform(1.08, 1.25)
        parts.append(replace(crescent, rx=crescent.rx * grown, ry=crescent.ry * grown, tone=base.tone))
    parts += [crescent, base, cavity]
    return parts + _small_parts(rng, len(parts), int(rng.integers(0, 4)), near=base)


def two_piece(rng: Rng) -> list[Part]:
    """A long bent structure in two touching pieces, among tubes and large regions that fill the field."""
    parts = [_blob(rng, *_log_uniform(rng, 0.4, 1.3, 2), group=i, tone=i) for i in range(int(rng.integers(2, 6)))]
    group, length = len(parts), rng.uniform(0.3, 0.75)
    x, y, z = rng.uniform(-0.2, 0.2, 3)
    whole = Part(x, y, z, length, length * rng.uniform(0.2, 0.5), rng.uniform(0.5, 1.2), group=group)
    whole = replace(whole, angle=rng.uniform(0, 2 * np.pi), bend=rng.normal(0, 0.6), rough=0.15, tone=group)
    whole = replace(whole, lean_x=rng.normal(0, 0.15), lean_y=rng.normal(0, 0.15))
    swell = rng.uniform(0.9, 1.5)
    same = rng.random() < 0.7
    head = replace(whole, ry=whole.ry * swell, cut_offset=rng.uniform(-0.3, 0.35), cut_angle=rng.normal(0, 0.3))
    parts += [whole, replace(head, tone=whole.tone if same else group + 1)]
    return parts + _small_parts(rng, len(parts), int(rng.integers(2, 6)))


def mosaic(rng: Rng) -> list[Part]:
    """Many touching regions, as a random paving."""
    parts = _body(rng, share=0.6)
    for _ in range(int(rng.integers(6, 13))):
        parts.append(_blob(rng, *_log_uniform(rng, 0.15, 0.6, 2), group=len(parts), tone=len(parts)))
    return parts


def shell(rng: Rng) -> list[Part]:
    """A thin closed wall around contents, in tissue that fills the field."""
    parts = [_blob(rng, *_log_uniform(rng, 0.4, 1.2, 2), group=i, tone=i) for i in range(int(rng.integers(1, 5)))]
    group, size = len(parts), rng.uniform(0.3, 0.75)
    x, y, z = rng.uniform(-0.2, 0.2, 3)
    wall = Part(x, y, z, size, size * rng.uniform(0.6, 1), rng.uniform(0.9, 1.6), group=group)
    wall = replace(wall, angle=rng.uniform(0, np.pi), rough=0.03, tone=group)
    thickness = rng.uniform(0.02, 0.08)
    content = replace(wall, rx=wall.rx - thickness, ry=wall.ry - thickness, tone=group + 1)
    parts += [wall, content]
    for i in range(int(rng.integers(1, 5))):
        parts.append(_inside(rng, content, rng.uniform(0.1, 0.4), tone=group + 2 + i))
    return parts


def layers(rng: Rng) -> list[Part]:
    """Bands that cross the field, with inclusions."""
    parts, level, turn = [], 1.0, rng.uniform(0, 2 * np.pi)
    for i in range(int(rng.integers(3, 7))):
        level -= rng.uniform(0.1, 0.5)
        reach = 4.0
        x, y = (level - reach) * np.cos(turn), (level - reach) * np.sin(turn)
        parts.append(Part(x, y, 0.0, reach, reach, 30.0, rough=rng.uniform(0.005, 0.03), group=i, tone=i))
    for _ in range(int(rng.integers(1, 5))):
        parts.append(_blob(rng, *_log_uniform(rng, 0.08, 0.3, 2), group=len(parts), tone=len(parts)))
    return parts + _small_parts(rng, len(parts), int(rng.integers(0, 3)))


TEMPLATES: dict[str, tuple[Callable[[Rng], list[Part]], float]] = {
    "organs": (organs, 0.3),
    "chambers": (chambers, 0.25),
    "two_piece": (two_piece, 0.15),
    "mosaic": (mosaic, 0.1),
    "shell": (shell, 0.1),
    "layers": (layers, 0.1),
}
"""Each kind of anatomy with how often it is drawn."""


def _log_uniform(rng: Rng, low: float, high: float, n: int) -> list[float]:
    return [float(v) for v in np.exp(rng.uniform(np.log(low), np.log(high), n))]


def _body(rng: Rng, share: float = 0.75) -> list[Part]:
    """The outline on air, and often a rim under the skin; nothing when the field lies within the body."""
    if rng.random() > share:
        return []
    x, y, _ = rng.normal(0, 0.05, 3)
    rx, ry = rng.uniform(0.65, 1.05, 2)
    skin = Part(x, y, 0.0, rx, ry, 20.0, exponent=rng.uniform(2, 3.5), rough=0.04, group=-1, tone=0)
    if rng.random() < 0.4:
        return [skin]
    rim = rng.uniform(0.03, 0.12)
    return [skin, replace(skin, rx=rx - rim, ry=ry - rim, tone=1)]


def _blob(rng: Rng, rx: float, ry: float, *, group: int, tone: int) -> Part:
    x, y = rng.uniform(-0.7, 0.7, 2)
    rz = rng.uniform(0.4, 1.4)
    part = Part(x, y, rng.uniform(-0.5, 0.5), rx, ry, rz, group=group, tone=tone)
    return replace(
        part,
        angle=rng.uniform(0, np.pi),
        exponent=rng.uniform(1.7, 3),
        bend=rng.normal(0, 0.4) if rng.random() < 0.4 else 0.0,
        lean_x=rng.normal(0, 0.15),
        lean_y=rng.normal(0, 0.15),
        rough=rng.uniform(0.05, 0.3),
        cut_angle=rng.uniform(0, 2 * np.pi),
        cut_offset=rng.uniform(-0.2, 0.6) if rng.random() < 0.2 else NO_CUT,
    )


def _inside(rng: Rng, outer: Part, ratio: float, *, tone: int) -> Part:
    """A part within another, of its group, so that they move together."""
    room = max(0.0, 0.8 - ratio)
    dx, dy = rng.uniform(-room, room, 2) * (outer.rx, outer.ry)
    cos, sin = np.cos(outer.angle), np.sin(outer.angle)
    return replace(
        outer,
        x=outer.x + cos * dx - sin * dy,
        y=outer.y + sin * dx + cos * dy,
        rx=outer.rx * ratio,
        ry=outer.ry * ratio * rng.uniform(0.8, 1.2),
        rz=outer.rz * rng.uniform(0.6, 1),
        tone=tone,
    )


def _crescent(rng: Rng, base: Part, turn: float) -> Part:
    """A part at the base's side that the base will partly cover."""
    away = base.rx * rng.uniform(0.7, 1.3)
    return replace(
        base,
        x=base.x + away * np.cos(turn),
        y=base.y + away * np.sin(turn),
        rx=base.rx * rng.uniform(0.6, 1.2),
        ry=base.ry * rng.uniform(0.8, 1.5),
        rz=base.rz * rng.uniform(0.7, 1.0),
        angle=turn,
        bend=-rng.uniform(0, 0.5),
        rough=0.12,
        tone=base.tone + 1,
    )


def _small_parts(rng: Rng, first: int, n: int, near: Part | None = None) -> list[Part]:
    """Vessels (long in z) and tiny parts, anywhere or around `near`."""
    parts = []
    for i in range(n):
        size = float(np.exp(rng.uniform(np.log(0.03), np.log(0.1))))
        part = _blob(rng, size, size * rng.uniform(0.7, 1.4), group=first + i, tone=first + int(rng.integers(0, n)))
        part = replace(part, rz=rng.uniform(0.6, 3), cut_offset=NO_CUT, bend=0.0)
        if near is not None:
            part = replace(part, x=near.x + rng.normal(0, 2 * near.rx), y=near.y + rng.normal(0, 2 * near.ry))
        parts.append(part)
    return parts
