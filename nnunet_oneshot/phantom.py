"""Made-up patients: small image sets that look like anatomy, with every label known, for the demo and for tests.

A phantom is a cross-section of a trunk: body on air, fat, muscle, spine, and organs as superellipsoids. Some touch
(liver and kidney), some are nested (a wall around a cavity), some are bright structures inside an organ that belong to
it (vessels), and some look like a labelled organ and are none (the spleen). All subjects share one anatomy and
differ by pose, by each organ's size and place, by a smooth deformation, by tissue intensities, bias field and noise.

What a subject is gets drawn first (`draw_subject`), and is then rendered (`render`) on any grid. Coordinates
are (z, y, x), 1 being half the nominal field of view; y points to the back, x to the patient's left.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk
from scipy import ndimage
from skimage import io

from nnunet_oneshot.errors import OneShotError

Triple = tuple[float, float, float]
FloatArray = npt.NDArray[np.float64]

LABELS = {"background": 0, "liver": 1, "kidney": 2, "wall": 3, "cavity": 4}
TISSUES = ("air", "fat", "muscle", "mesentery", "bone", "liver", "vessel", "spleen", "kidney", "wall", "cavity")


@dataclass(frozen=True)
class Organ:
    """A superellipsoid of the common anatomy; later ones lie over earlier ones.

    Attributes:
        tissue: a name of `TISSUES`.
        label: value in the label map.
        centre, radii: (z, y, x).
        exponent: 2 is an ellipsoid, more is boxier.
        angle: in-plane rotation in degrees.
        group: organs of a group move and grow together.
        freedom: how much the organ varies between subjects; 1 is usual.
    """

    tissue: str
    label: int
    centre: Triple
    radii: Triple
    group: str
    exponent: float = 2.0
    angle: float = 0.0
    freedom: float = 1.0


ANATOMY = (
    Organ("fat", 0, (0, 0, 0), (9, 0.74, 0.90), "body", 2.4, freedom=0),
    Organ("muscle", 0, (0, 0, 0), (9, 0.66, 0.82), "body", 2.4, freedom=0),
    Organ("mesentery", 0, (0, -0.05, 0), (9, 0.53, 0.72), "body", 2.6, freedom=0),
    Organ("bone", 0, (0, 0.40, 0), (9, 0.17, 0.15), "spine", freedom=0.2),
    Organ("cavity", 0, (0, 0.47, 0), (9, 0.05, 0.06), "spine", freedom=0.2),
    Organ("spleen", 0, (-0.2, 0.14, 0.50), (0.50, 0.22, 0.12), "spleen", 2.0, -15),
    Organ("liver", 1, (-0.15, -0.06, -0.36), (0.80, 0.36, 0.30), "liver", 2.6, 25),
    Organ("vessel", 1, (-0.15, -0.02, -0.36), (0.60, 0.04, 0.20), "liver", 2.0, 35, freedom=1.5),
    Organ("kidney", 2, (0.10, 0.24, -0.36), (0.60, 0.18, 0.13), "kidney", 2.2, 30),
    Organ("wall", 3, (0.05, -0.20, 0.28), (0.75, 0.25, 0.23), "stomach", 2.3, 20),
    Organ("cavity", 4, (0.05, -0.20, 0.28), (0.58, 0.15, 0.14), "stomach", 2.3, 20),
)


@dataclass(frozen=True)
class Kind:
    """What sort of images a set holds.

    Attributes:
        shape: (Z, Y, X) of the nominal field of view.
        spacing: (z, y, x) in mm, or pixels for 2D.
        channels: names as in dataset.json.
        file_ending: of images and labels.
        tissue: mean intensities, one value a channel for each tissue.
        substeps: planes that a thick slice is the average of.
        noise: standard deviation, in intensities.
    """

    shape: tuple[int, int, int]
    spacing: Triple
    channels: tuple[str, ...]
    file_ending: str
    tissue: Mapping[str, tuple[float, ...]]
    substeps: int
    noise: float


_MR = dict(zip(TISSUES, [(v,) for v in (0, 175, 55, 145, 85, 105, 60, 120, 190, 80, 225)], strict=True))
_STAINED = {
    "air": (242, 240, 244),
    "fat": (236, 214, 222),
    "muscle": (206, 120, 150),
    "mesentery": (228, 178, 196),
    "bone": (150, 120, 170),
    "liver": (170, 90, 130),
    "vessel": (205, 60, 80),
    "spleen": (150, 80, 135),
    "kidney": (120, 70, 150),
    "wall": (185, 105, 165),
    "cavity": (245, 232, 235),
}
KINDS: Mapping[str, Kind] = {
    "thick_slices": Kind((16, 96, 96), (5.0, 1.2, 1.2), ("MRI",), ".nii.gz", _MR, 3, 9.0),
    "isotropic": Kind((48, 56, 56), (2.0, 2.0, 2.0), ("MRI",), ".nii.gz", _MR, 1, 9.0),
    "rgb2d": Kind((1, 128, 128), (1.0, 1.0, 1.0), ("R", "G", "B"), ".png", _STAINED, 1, 8.0),
}


@dataclass(frozen=True, eq=False)
class Subject:
    """Everything that makes one patient different from the others.

    Attributes:
        scale, shift: of the whole body, (z, y, x); angle: in-plane, degrees.
        organ_scale, organ_shift: (organs, 3); organ_angle: (organs,), degrees.
        warp: coarse displacement field, (3, 4, 5, 5), over [-1.25, 1.25] on each axis.
        intensities: (tissues, channels).
        bias: coarse field of log intensities, (3, 4, 4), over the same box.
        noise_seed: of the noise and the texture.
    """

    scale: FloatArray
    shift: FloatArray
    angle: float
    organ_scale: FloatArray
    organ_shift: FloatArray
    organ_angle: FloatArray
    warp: FloatArray
    intensities: FloatArray
    bias: FloatArray
    noise_seed: int


@dataclass(frozen=True)
class PhantomDataset:
    """What `write_phantom_dataset` wrote.

    Attributes:
        folder: the raw dataset, which holds the label of `annotated` alone.
        truth: folder outside of it, with the labels of all cases, those of imagesTs included.
        annotated: the annotated case.
        cases: all cases of imagesTr.
        test_cases: those of imagesTs.
    """

    folder: Path
    truth: Path
    annotated: str
    cases: tuple[str, ...]
    test_cases: tuple[str, ...]


def write_phantom_dataset(
    folder: Path,
    dataset_id: int,
    name: str = "phantom",
    *,
    truth: Path,
    cases: int = 12,
    test_cases: int = 0,
    shape: tuple[int, int, int] | None = None,
    seed: int = 0,
    kind: str = "thick_slices",
) -> PhantomDataset:
    """Write an nnU-Net raw dataset of phantoms in which one case is annotated, and all labels to a folder elsewhere.

    Args:
        folder: where raw datasets lie (nnUNet_raw).
        truth: folder for the labels of all cases; not inside the dataset.
        cases, test_cases: images in imagesTr and imagesTs.
        shape: (Z, Y, X) of the nominal field of view; the kind's own when None.
        kind: "thick_slices" (1.2 x 1.2 x 5 mm), "isotropic" (2 mm) or "rgb2d" (PNG).

    Raises:
        OneShotError: unknown kind, fewer than two cases, the dataset is there already, or truth would lie inside it.
    """
    dataset = Path(folder) / f"Dataset{dataset_id:03d}_{name}"
    settings = _checked_kind(kind, shape)
    _check_target(dataset, Path(truth), cases)
    names = tuple(f"{name}_{i:03d}" for i in range(1, cases + test_cases + 1))
    for i, case in enumerate(names):
        image, label, origin = make_case(settings, np.random.SeedSequence([seed, i]))
        part = "imagesTr" if i < cases else "imagesTs"
        _write(dataset / part / f"{case}_0000{settings.file_ending}", image, settings, origin)
        _write(Path(truth) / f"{case}{settings.file_ending}", label[None], settings, origin)
        if i == 0:
            _write(dataset / "labelsTr" / f"{case}{settings.file_ending}", label[None], settings, origin)
    _write_dataset_json(dataset, settings)
    return PhantomDataset(dataset, Path(truth), names[0], names[:cases], names[cases:])


def make_case(
    kind: Kind, seed: np.random.SeedSequence
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8], Triple]:
    """Image (C, Z, Y, X), label (Z, Y, X), origin (x, y, z) in mm of one subject; the field of view varies a little."""
    rng = np.random.default_rng(seed)
    subject = draw_subject(kind, rng)
    flat = kind.shape[0] == 1
    change = rng.integers(-2, 3, size=3) * np.array([0 if flat else 0.5, 2, 2])
    shape = tuple(int(n + c) for n, c in zip(kind.shape, change, strict=True))
    x, y, z = rng.uniform(-20, 20, size=3).round(1)
    image, label = render(subject, kind, (shape[0], shape[1], shape[2]))
    return image, label, (float(x), float(y), float(z))


def draw_subject(kind: Kind, rng: np.random.Generator) -> Subject:
    """Draw a patient; the strengths are chosen so that copying a label over is poor and registering it is fair."""
    groups = sorted({organ.group for organ in ANATOMY})
    freedom = np.array([organ.freedom for organ in ANATOMY])[:, None]
    member = np.array([groups.index(organ.group) for organ in ANATOMY])
    own = rng.normal(size=(len(ANATOMY), 3))
    group_scale, group_shift = rng.normal(size=(2, len(groups), 3))
    tissue = np.array([kind.tissue[name] for name in TISSUES], dtype=float)
    return Subject(
        scale=1 + 0.07 * rng.uniform(-1, 1, size=3),
        shift=rng.uniform(-1, 1, size=3) * (0.09, 0.06, 0.06),
        angle=float(rng.uniform(-7, 7)),
        organ_scale=np.exp(freedom * (0.08 * group_scale[member] + 0.03 * own)),
        organ_shift=freedom * 0.035 * group_shift[member] * (1.5, 1, 1),
        organ_angle=(freedom[:, 0] * 8 * rng.normal(size=len(groups))[member]),
        warp=0.04 * rng.normal(size=(3, 4, 5, 5)),
        intensities=tissue * (1 + 0.05 * rng.normal(size=tissue.shape)) * rng.uniform(0.85, 1.15),
        bias=0.10 * rng.normal(size=(3, 4, 4)),
        noise_seed=int(rng.integers(2**31)),
    )


def render(
    subject: Subject, kind: Kind, shape: tuple[int, int, int]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8]]:
    """Image, float32 (C, Z, Y, X), and label, uint8 (Z, Y, X): the class that fills most of each voxel's thickness."""
    points = _grid(shape, kind)
    organ = _organ_map(_to_body(points, subject), subject)
    slab = (shape[0], kind.substeps, *shape[1:])
    label_of = np.array([0] + [o.label for o in ANATOMY])
    label = np.stack([(label_of[organ] == v).reshape(slab).mean(1) for v in range(len(LABELS))]).argmax(0)
    tissue = np.array([0] + [TISSUES.index(o.tissue) for o in ANATOMY])[organ]
    clean = np.stack([_blurred(values[tissue]).reshape(slab).mean(1) for values in subject.intensities.T])
    bias = np.exp(_interpolate(subject.bias, points)).reshape(slab).mean(1)
    return _acquire(clean, bias, kind, subject.noise_seed), label.astype(np.uint8)


def _grid(shape: tuple[int, int, int], kind: Kind) -> FloatArray:
    """Coordinates of all sampled points, (3, Z * substeps, Y, X)."""
    steps = (kind.substeps, 1, 1)
    axes = []
    for n, nominal, step in zip(shape, kind.shape, steps, strict=True):
        index = (np.arange(n * step) + 0.5) / step
        axes.append((2 * index - n) / nominal)
    return np.stack(np.meshgrid(*axes, indexing="ij"))


def _to_body(points: FloatArray, subject: Subject) -> FloatArray:
    """Where in the common anatomy each point lies, each organ's own variation apart."""
    displaced = points + np.stack([_interpolate(component, points) for component in subject.warp])
    return _turn((displaced - _column(subject.shift)) / _column(subject.scale), subject.angle)


def _turn(points: FloatArray, degrees: float) -> FloatArray:
    cos, sin = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    z, y, x = points
    return np.stack([z, cos * y - sin * x, sin * y + cos * x])


def _organ_map(body: FloatArray, subject: Subject) -> npt.NDArray[np.int64]:
    """1 + the index of the uppermost organ at each point, 0 outside of all."""
    top = np.zeros(body.shape[1:], dtype=np.int64)
    variation = zip(ANATOMY, subject.organ_shift, subject.organ_scale, subject.organ_angle, strict=True)
    for i, (organ, shift, scale, angle) in enumerate(variation):
        seen = _turn(body - _column(organ.centre + shift), organ.angle + angle) / _column(organ.radii * scale)
        top[(np.abs(seen) ** organ.exponent).sum(0) < 1] = i + 1
    return top


def _column(triple: FloatArray) -> FloatArray:
    return triple[:, None, None, None]


def _interpolate(coarse: FloatArray, points: FloatArray) -> FloatArray:
    """A coarse field over [-1.25, 1.25] at given points, cubic."""
    size = np.array(coarse.shape)[:, None, None, None]
    return ndimage.map_coordinates(coarse, (points / 2.5 + 0.5) * (size - 1), order=3, mode="nearest")


def _blurred(volume: FloatArray) -> FloatArray:
    """In-plane point spread of half a voxel."""
    return ndimage.gaussian_filter(volume, (0, 0.5, 0.5))


def _acquire(clean: FloatArray, bias: FloatArray, kind: Kind, seed: int) -> npt.NDArray[np.float32]:
    """Add texture, bias field and noise; magnitude (Rician) noise for MR, clipped 8 bits for colour."""
    rng = np.random.default_rng(seed)
    texture = 1 + 0.12 * ndimage.gaussian_filter(rng.normal(size=bias.shape), (0, 0.8, 0.8))
    signal = clean * texture * bias
    noise = kind.noise * rng.normal(size=(2, *clean.shape))
    if kind.file_ending == ".png":
        return np.clip(np.round(signal + noise[0]), 0, 255).astype(np.float32)
    return np.round(np.hypot(signal + noise[0], noise[1])).astype(np.float32)


def _checked_kind(kind: str, shape: tuple[int, int, int] | None) -> Kind:
    if kind not in KINDS:
        raise OneShotError(f"expected a kind of phantom among {', '.join(KINDS)}, found {kind!r}; choose one of them")
    base = KINDS[kind]
    if shape is None:
        return base
    # The anatomy fills the field of view: fewer voxels are larger ones.
    z, y, x = (s * n / m for s, n, m in zip(base.spacing, base.shape, shape, strict=True))
    return replace(base, shape=shape, spacing=(z, y, x) if base.file_ending != ".png" else base.spacing)


def _check_target(dataset: Path, truth: Path, cases: int) -> None:
    if cases < 2:
        raise OneShotError(f"expected at least 2 cases (one annotated, one to label), found {cases}; ask for more")
    if dataset.exists():
        raise OneShotError(f"{dataset} exists already; take it away or choose another dataset id or name")
    if dataset.resolve() in (truth.resolve(), *truth.resolve().parents):
        raise OneShotError(
            f"true labels must lie outside of the dataset {dataset}, found {truth}; choose another folder"
        )


def _write(path: Path, channels: npt.NDArray[np.generic], kind: Kind, origin: Triple) -> None:
    """Write one file: (1, Z, Y, X) as a volume, (C, 1, Y, X) as a picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind.file_ending == ".png":
        pixels = np.moveaxis(channels[:, 0], 0, -1).astype(np.uint8)
        io.imsave(path, pixels.squeeze(), check_contrast=False)
        return
    image = sitk.GetImageFromArray(channels[0].astype(np.int16))
    image.SetSpacing(kind.spacing[::-1])
    image.SetOrigin(origin)
    sitk.WriteImage(image, str(path), True)


def _write_dataset_json(dataset: Path, kind: Kind) -> None:
    content = {
        "channel_names": {str(i): channel for i, channel in enumerate(kind.channels)},
        "labels": LABELS,
        "numTraining": 1,
        "file_ending": kind.file_ending,
        "description": "phantoms: no patient, no licence needed",
    }
    (dataset / "dataset.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
