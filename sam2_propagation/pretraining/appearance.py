"""From label maps to images: tissue tones and texture, then what scanners add.

A `Look` is drawn once a volume (all its slices share it); `render` applies the looks of a batch of frames at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F

from sam2_propagation.pretraining.parts import FloatArray, Subject

MAX_TONES = 64
TEXTURE_GRAINS = (1, 3, 8)
"""Side of a texture's grain in pixels."""
COARSE_SHARE = 0.4
"""Share of the volumes that were acquired with fewer pixels than the network sees."""
MOST_COARSE = 5.5
"""An image of 35 pixels a side, seen at 192."""


@dataclass(frozen=True)
class Look:
    """The appearance of one volume.

    Attributes:
        tones: float32 (MAX_TONES + 1,), intensity of air and of each tone.
        textures: float32 (MAX_TONES + 1, grains), amplitude of each texture in each tone.
        clutter: strength (signed) of patches, lines and slow changes that belong to no part.
        seen_inside: how much of that shows in the parts too, 0 to 1.
        softness: width of the boundaries in pixels (partial volume).
        gamma, noise, grainy_noise, speckle, blur, bias, bias_phase: usual meanings, 0 (gamma 1) is none.
        streak, streak_at, streak_rays: strength, centre (x, y) and number of rays of the streaks.
        ghost, ghost_shift: strength and shift (pixels, y and x) of a motion ghost.
        fan: (half angle in radians, depth) of an ultrasound sector; half angle 0 for none.
        window: (low, high) shift of the percentile window, as left by other slices of the volume.
        coarse: pixels of the image for each pixel that was acquired, 1 or more: a small image is interpolated.
    """

    tones: FloatArray
    textures: FloatArray
    clutter: tuple[float, float, float]
    seen_inside: float
    softness: float
    gamma: float
    noise: float
    grainy_noise: float
    speckle: float
    blur: float
    bias: float
    bias_phase: tuple[float, float, float]
    streak: float
    streak_at: tuple[float, float]
    streak_rays: int
    ghost: float
    ghost_shift: tuple[int, int]
    fan: tuple[float, float]
    window: tuple[float, float]
    coarse: float


def draw_look(rng: np.random.Generator) -> Look:
    """A random appearance: tones first, then each artefact with its own probability."""
    ultrasound = rng.random() < 0.15
    tones, textures = _draw_tones(rng)
    if ultrasound:
        textures *= 2
    return Look(
        tones=tones,
        textures=textures,
        clutter=_draw_clutter(rng),
        seen_inside=float(rng.uniform(0, 0.6)),
        softness=float(rng.uniform(0.4, 2.5)),
        gamma=float(np.exp(rng.normal(0, 0.25))),
        noise=float(rng.uniform(0, 0.08) * rng.integers(0, 2)),
        grainy_noise=float(rng.uniform(0, 0.06)),
        speckle=float(rng.uniform(0.2, 0.7) if ultrasound else 0),
        blur=float(rng.uniform(0, 3)),
        bias=float(rng.uniform(0, 0.5) * rng.integers(0, 2)),
        bias_phase=(float(rng.uniform(0, 6.3)), float(rng.uniform(0, 6.3)), float(rng.uniform(0, 3.1))),
        streak=float(rng.uniform(0.03, 0.15) if rng.random() < 0.1 else 0),
        streak_at=(float(rng.uniform(-0.7, 0.7)), float(rng.uniform(-0.7, 0.7))),
        streak_rays=int(rng.integers(5, 30)),
        ghost=float(rng.uniform(0.05, 0.25) if rng.random() < 0.15 else 0),
        ghost_shift=(int(rng.integers(-30, 31)), int(rng.integers(-4, 5))),
        fan=(float(rng.uniform(0.5, 1.0)), float(rng.uniform(1.7, 2.2))) if ultrasound else (0.0, 2.0),
        window=(float(rng.uniform(-0.05, 0.05)), float(rng.uniform(-0.05, 0.3))),
        coarse=float(rng.uniform(1.3, MOST_COARSE) if rng.random() < COARSE_SHARE else 1),
    )


def same_contrast(rng: np.random.Generator, look: Look, amount: float) -> Look:
    """Another scan with the same protocol: the tones move a little, the artefacts are drawn anew."""
    fresh = draw_look(rng)
    tones = look.tones + 0.08 * amount * rng.standard_normal(look.tones.shape).astype(np.float32)
    tones[0] = look.tones[0]
    modality = replace(
        fresh,
        tones=tones.clip(0, 1),
        textures=look.textures,
        clutter=look.clutter,
        seen_inside=look.seen_inside,
        softness=look.softness,
        speckle=look.speckle,
        fan=look.fan,
        coarse=look.coarse,
    )
    if amount > 0.5:
        return modality
    return replace(modality, blur=look.blur, bias=look.bias, gamma=look.gamma, noise=look.noise)


def _draw_clutter(rng: np.random.Generator) -> tuple[float, float, float]:
    """Strength of patches, lines and slow changes; none in a third of the volumes."""
    if rng.random() < 0.33:
        return 0.0, 0.0, 0.0
    return float(rng.normal(0, 0.15)), float(rng.normal(0, 0.2)), float(rng.normal(0, 0.08))


def _draw_tones(rng: np.random.Generator) -> tuple[FloatArray, FloatArray]:
    tones = rng.uniform(0.1, 1, MAX_TONES + 1).astype(np.float32)
    if rng.random() < 0.3:
        levels = rng.uniform(0.1, 1, 4)
        tones = (levels[rng.integers(0, 4, MAX_TONES + 1)] + rng.normal(0, 0.05, MAX_TONES + 1)).astype(np.float32)
    tones[0] = 0 if rng.random() < 0.7 else rng.uniform(0, 1)
    size = np.exp(rng.uniform(np.log(0.005), np.log(0.12), (MAX_TONES + 1, 1)))
    textures = (size * rng.dirichlet([0.7] * len(TEXTURE_GRAINS), MAX_TONES + 1)).astype(np.float32)
    if tones[0] == 0:
        textures[0] *= 0.1
    return tones.clip(0, 1), textures


def render(
    values: torch.Tensor,
    radius: torch.Tensor,
    clutter: torch.Tensor,
    subjects: Sequence[Subject],
    looks: Sequence[Look],
    generator: torch.Generator,
) -> torch.Tensor:
    """Images of implicit functions.

    Args:
        values: (frames, parts, H, W) of `implicit_functions`.
        radius: (frames, parts) of `part_radius`.
        clutter: (frames, 3, H, W) of `rendering.clutter`.
        subjects, looks: for each frame, whose and how.
        generator: the source of noise, on the device of `values`.

    Returns:
        float32 (frames, H, W), not yet normalised.
    """
    noise = _noises(values, generator)
    image = _tissue(values, radius, _structure(clutter, looks), subjects, looks, noise)
    image = _field_effects(image, looks)
    image = _ghost(image, looks)
    image = _blurred(image, looks)
    image = _add_noise(image, looks, generator)
    image = _acquired(image, looks)
    return _fan(image, looks)


def normalise(images: torch.Tensor, volumes: Sequence[int], looks: Sequence[Look]) -> torch.Tensor:
    """Scale each volume's frames to [0, 1] by its 0.5 and 99.5 percentiles, as the propagator does."""
    scaled = torch.empty_like(images)
    for volume in sorted(set(volumes)):
        index = [i for i, v in enumerate(volumes) if v == volume]
        sample = images[index][:, ::3, ::3].flatten()
        low, high = torch.quantile(sample, torch.tensor([0.005, 0.995], device=images.device)).tolist()
        span = max(high - low, 1e-3)
        shift_low, shift_high = looks[index[0]].window
        scaled[index] = (images[index] - low - shift_low * span) / (span * (1 + shift_high - shift_low))
    return scaled.clamp_(0, 1)


def _column(looks: Sequence[Look], name: str, like: torch.Tensor) -> torch.Tensor:
    return torch.tensor([getattr(k, name) for k in looks], dtype=like.dtype, device=like.device).view(-1, 1, 1)


def _noises(values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Unit noise of each grain, (grains, frames, H, W)."""
    n, _, h, w = values.shape
    grains = []
    for grain in TEXTURE_GRAINS:
        coarse = torch.randn(n, 1, h // grain + 1, w // grain + 1, device=values.device, generator=generator)
        grains.append(F.interpolate(coarse, size=(h, w), mode="bilinear", align_corners=False)[:, 0])
    return torch.stack(grains)


def _tissue(
    values: torch.Tensor,
    radius: torch.Tensor,
    structure: torch.Tensor,
    subjects: Sequence[Subject],
    looks: Sequence[Look],
    noise: torch.Tensor,
) -> torch.Tensor:
    """Parts painted in order with soft boundaries; `structure` (frames, H, W) shows most between them."""
    _n, n_parts, size, _ = values.shape
    tone, texture = _part_tones(subjects, looks, n_parts, values)
    shows = _structure_shares(subjects, looks, n_parts, values)
    softness = _column(looks, "softness", values)[:, 0]
    sharpness = (4 * radius * size / 2 / softness).clamp(max=200)[..., None, None]
    image = tone[:, 0, None, None] + _mix(texture[:, 0], noise) + shows[:, 0] * structure
    for part in range(n_parts):
        cover = torch.sigmoid(values[:, part] * sharpness[:, part])
        tissue = tone[:, part + 1, None, None] + _mix(texture[:, part + 1], noise) + shows[:, part + 1] * structure
        image = torch.lerp(image, tissue, cover)
    return image


def _structure(clutter: torch.Tensor, looks: Sequence[Look]) -> torch.Tensor:
    """Patches of other tissue, lines as vessels and fasciae are, and slow changes: (frames, H, W)."""
    strength = torch.tensor([k.clutter for k in looks], device=clutter.device)[..., None, None]
    patches = torch.sigmoid(12 * (clutter[:, 0].abs() - 0.8))
    lines = torch.exp(-(clutter[:, 1] / 0.15).square())
    return strength[:, 0] * patches + strength[:, 1] * lines + strength[:, 2] * clutter[:, 2]


def _structure_shares(
    subjects: Sequence[Subject], looks: Sequence[Look], n_parts: int, like: torch.Tensor
) -> torch.Tensor:
    """How much of the structure shows in air and in each part, (frames, 1 + parts, 1, 1): all of it in the body."""
    shares = np.zeros((len(looks), n_parts + 1), np.float32)
    for row, subject, look in zip(shares, subjects, looks, strict=True):
        row[0] = float(look.tones[0] > 0)
        row[1 : len(subject.parts) + 1] = [1 if p.group < 0 else look.seen_inside for p in subject.parts]
    return torch.from_numpy(shares).to(like)[..., None, None]


def _mix(weights: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    return torch.einsum("ng,gnhw->nhw", weights, noise)


def _part_tones(
    subjects: Sequence[Subject], looks: Sequence[Look], n_parts: int, like: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tone (frames, 1 + parts) and texture (frames, 1 + parts, grains)."""
    index = np.zeros((len(looks), n_parts + 1), np.int64)
    for row, subject in zip(index, subjects, strict=True):
        row[1 : len(subject.parts) + 1] = [1 + p.tone % MAX_TONES for p in subject.parts]
    tones = np.stack([k.tones[i] for k, i in zip(looks, index, strict=True)])
    textures = np.stack([k.textures[i] for k, i in zip(looks, index, strict=True)])
    return torch.from_numpy(tones).to(like), torch.from_numpy(textures).to(like)


def _positions(image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """y and x in [-1, 1], (1, H, 1) and (1, 1, W)."""
    h, w = image.shape[-2:]
    y = torch.linspace(-1, 1, h, device=image.device).view(1, -1, 1)
    x = torch.linspace(-1, 1, w, device=image.device).view(1, 1, -1)
    return y, x


def _field_effects(image: torch.Tensor, looks: Sequence[Look]) -> torch.Tensor:
    """Gamma, bias field and streaks."""
    y, x = _positions(image)
    phase = torch.tensor([k.bias_phase for k in looks], device=image.device).view(-1, 3, 1, 1)
    field = torch.sin(1.6 * x + phase[:, 0]) * torch.cos(1.6 * y + phase[:, 1]) + 0.5 * torch.sin(
        x * torch.cos(phase[:, 2]) + y * torch.sin(phase[:, 2])
    )
    image = image.clamp(min=0) ** _column(looks, "gamma", image) * (1 + _column(looks, "bias", image) * field)
    if not any(k.streak for k in looks):
        return image
    at = torch.tensor([k.streak_at for k in looks], device=image.device).view(-1, 2, 1, 1)
    turn = torch.atan2(y - at[:, 1], x - at[:, 0])
    rays = torch.sin(turn * _column(looks, "streak_rays", image)) * torch.cos(7 * turn)
    return image + _column(looks, "streak", image) * rays


def _ghost(image: torch.Tensor, looks: Sequence[Look]) -> torch.Tensor:
    mixed = [
        torch.lerp(frame, torch.roll(frame, k.ghost_shift, (0, 1)), k.ghost) if k.ghost else frame
        for frame, k in zip(image, looks, strict=True)
    ]
    return torch.stack(mixed)


def _blurred(image: torch.Tensor, looks: Sequence[Look]) -> torch.Tensor:
    """A binomial blur applied `blur` times, the fraction by interpolation."""
    times = _column(looks, "blur", image)
    kernel = torch.tensor([0.25, 0.5, 0.25], device=image.device)
    kernel = (kernel[:, None] * kernel)[None, None]
    for step in range(int(np.ceil(float(times.max())))):
        smooth = F.conv2d(F.pad(image[:, None], (1, 1, 1, 1), mode="replicate"), kernel)[:, 0]
        image = torch.lerp(image, smooth, (times - step).clamp(0, 1))
    return image


def _add_noise(image: torch.Tensor, looks: Sequence[Look], generator: torch.Generator) -> torch.Tensor:
    """White noise, noise with the scanner's grain, and multiplicative speckle that is longer across the beam."""
    white = torch.randn(image.shape, device=image.device, generator=generator)
    grainy = F.avg_pool2d(white, 3, 1, 1) * 3
    speckle = F.avg_pool2d(white.flip(1)[:, None], (1, 5), 1, (0, 2))[:, 0] * 2.2
    image = image + _column(looks, "noise", image) * white + _column(looks, "grainy_noise", image) * grainy
    return image * (1 + _column(looks, "speckle", image) * speckle).clamp(min=0)


def _acquired(image: torch.Tensor, looks: Sequence[Look]) -> torch.Tensor:
    """Averaged over the pixels of the acquisition, then interpolated between them."""
    size = image.shape[-1]
    frames = [
        F.interpolate(
            F.adaptive_avg_pool2d(frame[None, None], round(size / look.coarse)),
            size=(size, size),
            mode="bilinear",
            align_corners=False,
        )[0, 0]
        if look.coarse > 1
        else frame
        for frame, look in zip(image, looks, strict=True)
    ]
    return torch.stack(frames)


def _fan(image: torch.Tensor, looks: Sequence[Look]) -> torch.Tensor:
    """Black outside an ultrasound sector whose apex is above the image."""
    if not any(k.fan[0] for k in looks):
        return image
    y, x = _positions(image)
    half, depth = (torch.tensor([k.fan[i] for k in looks], device=image.device).view(-1, 1, 1) for i in (0, 1))
    inside = (torch.atan2(x.abs(), y + 1.5) < half) & (torch.hypot(x, y + 1.5) < depth + 0.8)
    return torch.where(inside | (half == 0), image, torch.zeros_like(image))
