"""Presets, training settings and the "oneshot" block of dataset.json: values only, nothing that reads files."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from nnunet_oneshot.errors import OneShotError

BLOCK_KEY = "oneshot"
BLOCK_SCHEMA = 1
DEFAULT_PLANS = "nnUNetPlans"
SMALL_PLANS = "nnUNetOneShotSmallPlans"
DEFAULT_TRAINER = "OneShotTrainer"


@dataclass(frozen=True)
class Schedule:
    """How long a training lasts.

    Attributes:
        epochs: number of epochs.
        iterations: training iterations of an epoch.
        validation_iterations: validation iterations of an epoch.
        save_every: epochs between two resumable checkpoints.
    """

    epochs: int
    iterations: int
    validation_iterations: int
    save_every: int


@dataclass(frozen=True)
class PlannerLimits:
    """What bounds the networks that `nnUNetOneShotSmallPlans` plans.

    Attributes:
        base_features: features of the first stage; they double with every stage.
        max_features: features that no stage exceeds.
        elements_2d: feature map elements of one 2D iteration, batch included, as nnU-Net's planner counts them.
        elements_3d: the same for 3D, where an element costs about twice the time.
        max_batch: samples that no batch exceeds, so that augmentation does not outlast the network.
        least_of_image_2d: share of the median image that a 2D patch holds at least; where nnU-Net's own would hold
            less, pixels are coarser, so that it holds all of it.
    """

    base_features: int
    max_features: int
    elements_2d: float
    elements_3d: float
    max_batch: int
    least_of_image_2d: float = 0.5


@dataclass(frozen=True)
class Preset:
    """One choice of plans, trainer and length; every row of a comparison uses the same one.

    Attributes:
        name: what `-preset` takes.
        plans: nnU-Net's plans identifier.
        trainer_suffix: what is appended to a trainer's name.
        schedule: training length, None for nnU-Net's own (1000 epochs of 250 iterations).
        planner: limits of the plans, None for nnU-Net's own planner.
        mirroring: whether predictions of our commands average over mirrored images, as nnU-Net's do.
    """

    name: str
    plans: str
    trainer_suffix: str = ""
    schedule: Schedule | None = None
    planner: PlannerLimits | None = None
    mirroring: bool = True

    def trainer(self, base: str = DEFAULT_TRAINER) -> str:
        """The name of trainer `base` in this preset, for example `OneShotTrainer_small`."""
        return base + self.trainer_suffix


# Chosen on random arrays (one EPYC core: 55 ns for an element in 3D, 25 ns in 2D, forward and backward), so that an
# iteration takes about half a second on two cores.
_SMALL_LIMITS = PlannerLimits(base_features=8, max_features=64, elements_2d=28e6, elements_3d=12e6, max_batch=12)

PRESETS: Mapping[str, Preset] = {
    "default": Preset("default", DEFAULT_PLANS),
    "small": Preset("small", SMALL_PLANS, "_small", Schedule(30, 50, 5, 3), _SMALL_LIMITS),
    "tiny": Preset("tiny", SMALL_PLANS, "_tiny", Schedule(10, 20, 5, 2), _SMALL_LIMITS, mirroring=False),
}


@dataclass(frozen=True)
class LossSettings:
    """What divergence voxels teach: by default their best guess; where they carry none, consistency alone (YoloSeg).

    Attributes:
        ramp_start: fraction of the training before which the consistency term weighs nothing.
        end_weight: its weight at the last iteration; linear in between. 0 switches the term off.
        guess_share: share of the draws of a case whose divergence voxels carry their best guess instead of ignore.
        annotated_share: share of the draws that annotated cases have at least.
        cross_patch: probability of the cross-patch augmentation for a sample with divergence (YoloSeg: 0.2).
        cross_patch_labels: whether consensus pasted into the annotated case keeps its labels; YoloSeg ignores them.
        full_passes: passes of an iteration that learn, each of another view (YoloSeg: 3). With 1 the batch is compared
            with one view of its samples with divergence, which the network is asked about without gradient.
        every: iterations from one comparison of views to the next, counted over the whole training.
        teacher_decay: who is asked about that view: a running mean of the network's weights with this decay (mean
            teacher, as a rule .99), or with 0 the network itself. A resumed training starts a new mean.
    """

    ramp_start: float = 0.1
    end_weight: float = 0.5
    guess_share: float = 1.0
    annotated_share: float = 0.0
    cross_patch: float = 0.0
    cross_patch_labels: bool = False
    full_passes: int = 1
    every: int = 1
    teacher_decay: float = 0.0

    def __post_init__(self) -> None:
        shares = {name: getattr(self, name) for name in ("ramp_start", "guess_share", "annotated_share", "cross_patch")}
        outside = [f"{name} {share}" for name, share in shares.items() if not 0 <= share <= 1]
        if outside:
            raise OneShotError(f"expected {', '.join(shares)} in [0, 1], found {', '.join(outside)}; correct it")
        if self.annotated_share == 1:
            raise OneShotError("expected an annotated_share below 1, found 1; pseudo labels must be drawn, too")
        if not 0 <= self.end_weight < float("inf"):
            raise OneShotError(f"expected an end_weight of 0 or more, found {self.end_weight}; correct it")
        if self.full_passes < 1 or self.every < 1 or not 0 <= self.teacher_decay < 1:
            raise OneShotError(
                "expected full_passes and every of 1 or more and a teacher_decay in [0, 1), found "
                f"{self.full_passes}, {self.every} and {self.teacher_decay}; correct them"
            )
        if self.full_passes > 1 and self.teacher_decay > 0:
            raise OneShotError(
                f"expected full_passes 1 beside a teacher_decay, found {self.full_passes}: a teacher does not learn; "
                "set one of them alone"
            )


@dataclass(frozen=True)
class OneShotBlock:
    """The "oneshot" block of dataset.json: all that the trainer reads of ours.

    Attributes:
        round: how often the labels have been refreshed.
        annotated: cases with a label drawn by a person; always in training.
        left_out: cases that are never in training or validation (failed, gated or rejected).
        case_weight: how often a case is drawn in training, relative to 1 for those not named.
    """

    round: int = 0
    annotated: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    case_weight: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The block as it stands in dataset.json."""
        return {
            "schema": BLOCK_SCHEMA,
            "round": self.round,
            "annotated": list(self.annotated),
            "left_out": list(self.left_out),
            "case_weight": dict(self.case_weight),
        }


def preset(name: str) -> Preset:
    """The preset called `name`; OneShotError names those that there are."""
    if name not in PRESETS:
        raise OneShotError(f"preset must be one of {', '.join(PRESETS)}, found '{name}'")
    return PRESETS[name]


def schedule_of(trainer: str) -> Schedule | None:
    """The schedule that a trainer's name stands for, None where it is nnU-Net's own or unknown."""
    return _preset_of(trainer).schedule


def mirrors(trainer: str) -> bool:
    """Whether predictions by a trainer's model average over mirrored images."""
    return _preset_of(trainer).mirroring


def _preset_of(trainer: str) -> Preset:
    fitting = (p for p in PRESETS.values() if p.trainer_suffix and trainer.endswith(p.trainer_suffix))
    return next(fitting, PRESETS["default"])


def parse_block(dataset_json: Mapping[str, Any], cases: Collection[str] | None = None) -> OneShotBlock | None:
    """Read the "oneshot" block of a dataset.json.

    Args:
        dataset_json: the whole file, parsed.
        cases: the identifiers of the data set; where given, every case that the block names must be among them.

    Returns:
        The block, or None where dataset.json has none.

    Raises:
        OneShotError: a newer schema, a field of the wrong type or an unknown case.
    """
    raw = dataset_json.get(BLOCK_KEY)
    if raw is None:
        return None
    _check_schema(raw)
    block = OneShotBlock(
        round=_integer(raw, "round"),
        annotated=_names(raw, "annotated"),
        left_out=_names(raw, "left_out"),
        case_weight=_weights(raw),
    )
    _check_names(block, cases)
    return block


def _check_schema(raw: object) -> None:
    if not isinstance(raw, Mapping) or not isinstance(raw.get("schema"), int):
        raise OneShotError('dataset.json: "oneshot" must be an object with an integer "schema"; write it again')
    if not 1 <= raw["schema"] <= BLOCK_SCHEMA:
        raise OneShotError(
            f'dataset.json: the "oneshot" block has schema {raw["schema"]}, this version reads up to {BLOCK_SCHEMA}; '
            "install a newer nnunet-oneshot"
        )


def _integer(raw: Mapping[str, Any], key: str) -> int:
    value = raw.get(key, 0)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise OneShotError(f'dataset.json: "oneshot"/"{key}" must be an integer >= 0, found {value!r}; correct it')
    return value


def _names(raw: Mapping[str, Any], key: str) -> tuple[str, ...]:
    value = raw.get(key, [])
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise OneShotError(f'dataset.json: "oneshot"/"{key}" must be a list of case names, found {value!r}; correct it')
    return tuple(value)


def _weights(raw: Mapping[str, Any]) -> dict[str, float]:
    value = raw.get("case_weight", {})
    if not isinstance(value, Mapping):
        raise OneShotError(f'dataset.json: "oneshot"/"case_weight" must be an object, found {value!r}; correct it')
    bad = {case: weight for case, weight in value.items() if not _is_weight(weight)}
    if bad:
        raise OneShotError(f'dataset.json: "oneshot"/"case_weight" must hold numbers >= 0, found {bad}; correct it')
    return {case: float(weight) for case, weight in value.items()}


def _is_weight(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < float("inf")


def _check_names(block: OneShotBlock, cases: Collection[str] | None) -> None:
    both = sorted(set(block.annotated) & set(block.left_out))
    if both:
        raise OneShotError(f'dataset.json: "oneshot" has {both} both in annotated and in left_out; remove one')
    named = {*block.annotated, *block.left_out, *block.case_weight}
    unknown = sorted(named - set(cases)) if cases is not None else []
    if unknown:
        raise OneShotError(
            f'dataset.json: the "oneshot" block names cases that the data set lacks: {", ".join(unknown[:5])}'
            f"{' ...' if len(unknown) > 5 else ''}; run nnUNetv2_oneshot_propagate again with --overwrite"
        )
