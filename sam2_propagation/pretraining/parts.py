"""The words of synthetic anatomy: a part is one implicit solid, an anatomy is an ordered list of parts.

Coordinates are fractions of the half field of view: x and y run over [-1, 1] in a slice, z over [-1, 1] through the
stack. Later parts are painted over earlier ones, so a ring is a large part under a small one and a crescent is a part
whose side is covered.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]

NO_CUT = 9.0
"""A cut offset so far out that the cutting plane leaves the whole part."""


@dataclass(frozen=True)
class Part:
    """One super-ellipsoid with a bent axis, a lean through the stack and one cutting plane.

    Attributes:
        x, y, z: centre.
        rx, ry, rz: half axes.
        angle: in-plane rotation, radians.
        exponent: 2 is an ellipsoid, larger ones are boxier.
        bend: how far the ends of the x axis curve towards y, in units of ry.
        lean_x, lean_y: shift of the centre for each unit of z.
        cut_angle, cut_offset: the plane (in the part's own frame, in units of its half axes) beyond which nothing is.
        rough: amplitude of the boundary's lumps, in units of the half axes.
        group: parts that move together when another subject is made; -1 for the body, which only the affine moves.
        tone: parts with one tone have one intensity (look-alikes).
    """

    x: float
    y: float
    z: float
    rx: float
    ry: float
    rz: float
    angle: float = 0.0
    exponent: float = 2.0
    bend: float = 0.0
    lean_x: float = 0.0
    lean_y: float = 0.0
    cut_angle: float = 0.0
    cut_offset: float = NO_CUT
    rough: float = 0.1
    group: int = 0
    tone: int = 0


SHAPE_FIELDS = tuple(f.name for f in fields(Part) if f.name not in ("group", "tone"))


@dataclass(frozen=True)
class Subject:
    """One individual: its parts and the smooth random fields that make it differ from the ideal shapes.

    Attributes:
        parts: in painting order.
        lumps: float32 (parts, D, G, G), boundary lumps of each part through the stack.
        elastic: float32 (2, D, E, E), displacement (x, y) through the stack.
        clutter: float32 (3, D, K, K), what the image holds besides the parts: patches, lines and slow changes.
        affine: float32 (2, 3), from image to anatomy coordinates.
        stretch_z, shift_z: anatomy z = stretch_z * z + shift_z.
    """

    parts: tuple[Part, ...]
    lumps: FloatArray
    elastic: FloatArray
    clutter: FloatArray
    affine: FloatArray
    stretch_z: float = 1.0
    shift_z: float = 0.0


LUMP_GRID = (3, 8, 8)
ELASTIC_GRID = (3, 6, 6)
CLUTTER_GRID = (8, 14, 14)


def draw_fields(rng: np.random.Generator, n_parts: int) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Unit-variance lumps (parts, D, G, G), elastic field (2, D, E, E) and clutter (3, D, K, K)."""
    lumps = rng.standard_normal((n_parts, *LUMP_GRID), dtype=np.float32)
    elastic = rng.standard_normal((2, *ELASTIC_GRID), dtype=np.float32)
    clutter = rng.standard_normal((3, *CLUTTER_GRID), dtype=np.float32)
    return lumps, elastic, clutter


def draw_affine(rng: np.random.Generator, strength: float) -> FloatArray:
    """A random (2, 3) affine: rotation, anisotropic scale and shift that grow with `strength` in [0, 1]."""
    turn = rng.normal(0, 0.2 * strength)
    scale = np.exp(rng.normal(0, 0.12 * strength) + rng.normal(0, 0.07 * strength, 2))
    cos, sin = np.cos(turn), np.sin(turn)
    shift = rng.normal(0, 0.12 * strength, 2)
    return np.array([[scale[0] * cos, -sin, shift[0]], [sin, scale[1] * cos, shift[1]]], np.float32)


def first_subject(rng: np.random.Generator, parts: tuple[Part, ...]) -> Subject:
    """The individual that an anatomy was drawn as."""
    lumps, elastic, clutter = draw_fields(rng, len(parts))
    return Subject(parts, lumps, 0.04 * elastic, clutter, draw_affine(rng, 0.5))


def another_subject(rng: np.random.Generator, subject: Subject, strength: float) -> Subject:
    """Another individual of the same anatomy; `strength` says how unlike: 0 is the same individual, 1 much."""
    lumps, elastic, clutter = draw_fields(rng, len(subject.parts))
    keep = 1 - 0.6 * strength
    fresh = float(np.sqrt(1 - keep**2))
    step = _compose(subject.affine, draw_affine(rng, strength))
    return Subject(
        parts=_vary_parts(rng, subject.parts, strength),
        lumps=(keep * subject.lumps + fresh * lumps).astype(np.float32),
        elastic=(keep * subject.elastic + 0.055 * strength * elastic).astype(np.float32),
        clutter=(keep * subject.clutter + fresh * clutter).astype(np.float32),
        affine=step,
        stretch_z=float(np.exp(rng.normal(0, 0.12 * strength))),
        shift_z=float(rng.normal(0, 0.08 * strength)),
    )


def draw_window(rng: np.random.Generator, subject: Subject) -> FloatArray:
    """A random (2, 3) affine from a part of the image to the whole of it, near where one of the parts was drawn."""
    share = float(rng.uniform(0.4, 0.85))
    part = subject.parts[int(rng.integers(len(subject.parts)))]
    room = 1 - share
    centre = np.clip(np.array([part.x, part.y]) + rng.normal(0, 0.1, 2), -room, room)
    return np.array([[share, 0, centre[0]], [0, share, centre[1]]], np.float32)


def cropped(subject: Subject, window: FloatArray | None) -> Subject:
    """The individual seen through a window of `draw_window`; its lumps and clutter stay as fine as in a whole image."""
    if window is None:
        return subject
    return replace(subject, affine=_compose(subject.affine, window), elastic=window[0, 0] * subject.elastic)


def _compose(first: FloatArray, second: FloatArray) -> FloatArray:
    linear = first[:, :2] @ second[:, :2]
    shift = first[:, :2] @ second[:, 2] + first[:, 2]
    return np.concatenate([linear, shift[:, None]], axis=1).astype(np.float32)


def _vary_parts(rng: np.random.Generator, parts: tuple[Part, ...], strength: float) -> tuple[Part, ...]:
    moves = {g: rng.normal(0, 1, 5) * strength for g in sorted({p.group for p in parts})}
    varied = [p if p.group < 0 else _vary_part(rng, p, moves[p.group], strength) for p in parts]
    if strength > 0.3 and len(varied) > 4 and rng.random() < 0.25 * strength:
        lost = int(rng.integers(1, len(varied)))
        varied[lost] = replace(varied[lost], rx=1e-3, ry=1e-3, rz=1e-3)
    return tuple(varied)


def _vary_part(rng: np.random.Generator, part: Part, move: npt.NDArray[np.float64], strength: float) -> Part:
    own = rng.normal(0, 1, 8) * strength
    reach = min(0.08, 0.5 * min(part.rx, part.ry) + 0.02)
    size = 0.12 * move[2]
    return replace(
        part,
        x=part.x + 0.05 * move[0] + 0.5 * reach * own[0],
        y=part.y + 0.05 * move[1] + 0.5 * reach * own[1],
        z=part.z + 0.05 * move[4],
        rx=part.rx * float(np.exp(size + 0.13 * own[2])),
        ry=part.ry * float(np.exp(size + 0.13 * own[3])),
        rz=part.rz * float(np.exp(0.1 * own[4])),
        angle=part.angle + 0.12 * move[3] + 0.08 * own[5],
        bend=part.bend + 0.12 * own[6],
        cut_offset=part.cut_offset + 0.12 * own[7],
    )
