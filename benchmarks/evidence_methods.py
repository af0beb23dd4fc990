"""What `evidence.py` compares: where labels come from, and who trains on them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from common import SPLITS

from nnunet_oneshot.propagators import PropagatorOptions

FLAT = ("hc18_us",)
"""Sets of single images: one slice a volume is all of it."""
CHOICES: Mapping[str, tuple[str, ...]] = {
    name: tuple(dict.fromkeys([split["annotated_default"], *split["annotated_choices"]]))
    for name, split in SPLITS.items()
}
"""The annotated cases that the protocol names, the default one first."""


@dataclass(frozen=True)
class Labels:
    """One way to label the pool.

    Attributes:
        number: id of the dataset that it writes.
        propagators: their names.
        options: how they are set up.
        slices: what they start from is one annotated slice in every volume of the pool (the one with the largest
            foreground area across its thickest axis), not one annotated case.
        flat: it labels 2D images alone; of volumes it is given the slices.
    """

    number: int
    propagators: tuple[str, ...]
    options: PropagatorOptions = field(default_factory=PropagatorOptions)
    slices: bool = False
    flat: bool = False


LABELS: Mapping[str, Labels] = {
    "registration": Labels(601, ("registration",)),
    "sam2": Labels(602, ("sam2",)),
    "sam2_registration": Labels(603, ("sam2", "registration")),
    # The published procedures with our checkpoint: theirs cannot be had everywhere, and one checkpoint for all rows
    # compares procedures rather than weights.
    "yoloseg": Labels(604, ("sam2",), PropagatorOptions(recipe="yoloseg", checkpoint="builtin"), flat=True),
    "ssl_medsam2": Labels(605, ("sam2",), PropagatorOptions(recipe="ssl_medsam2", checkpoint="builtin")),
    "across": Labels(606, ("sam2",), PropagatorOptions(mode="retrieve")),
    "oneseg": Labels(607, ("correspondence",), PropagatorOptions(recipe="oneseg")),
    "oneseg_slices": Labels(608, ("correspondence",), PropagatorOptions(recipe="oneseg"), slices=True),
    "slices": Labels(609, ("sam2", "correspondence"), slices=True),
    "ours": Labels(610, ("registration", "relay", "sam2")),
    "relay": Labels(611, ("registration", "relay")),
}


@dataclass(frozen=True)
class Method:
    """One row.

    Attributes:
        what: one line for the table.
        labels: whose labels, out of LABELS; "truth" for all labels of the pool, None for the annotated case's alone.
        trainer: a trainer's base name; None scores labels carried to the test images themselves.
        ignore: whether divergence is ignored; otherwise the best guess is trained on everywhere.
        rounds: of refinement.
        replaced: how often nnU-Net's own predictions take the place of all pseudo labels and it is trained anew, as
            SSL-MedSAM2 does (without its end at convergence).
        again: how often it is trained once more on the same labels, from the weights of before, as a round of ours is.
        configuration: nnU-Net's, where it is not the set's own.
        rival: what a user would pick in place of ours; other rows are parts and variants of it.
    """

    what: str
    labels: str | None
    trainer: str | None = "nnUNetTrainer"
    ignore: bool = False
    rounds: int = 0
    replaced: int = 0
    again: int = 0
    configuration: str | None = None
    rival: bool = False

    @property
    def by_slices(self) -> bool:
        """Whether it starts from one slice a volume."""
        return self.labels in LABELS and LABELS[self.labels].slices

    def fits(self, data: str) -> bool:
        """Whether it can be run on a set."""
        return data not in FLAT or not self.by_slices


METHODS: Mapping[str, Method] = {
    "full": Method("nnU-Net, fully supervised on the pool", "truth"),
    "full_again": Method("nnU-Net, fully supervised, trained once more", "truth", again=1),
    "annotated": Method("nnU-Net on the annotated case alone", None, rival=True),
    "registration_labels": Method("registration, as it is", "registration", trainer=None, rival=True),
    "registration_stock": Method("registration, then nnU-Net", "registration", rival=True),
    "across_labels": Method("SAM2 alone (retrieve mode), as it is", "across", trainer=None, rival=True),
    "across_stock": Method("SAM2 alone (retrieve mode), then nnU-Net", "across", rival=True),
    "sam2_labels": Method("SAM2 on registration (self mode), as it is", "sam2", trainer=None, rival=True),
    "sam2_stock": Method("SAM2 on registration (self mode), then nnU-Net", "sam2", rival=True),
    "sam2_stock_again": Method(
        "SAM2 on registration (self mode), then nnU-Net, trained once more", "sam2", again=1, rival=True
    ),
    "fused_stock": Method("SAM2 + registration, then nnU-Net", "sam2_registration"),
    "yoloseg": Method(
        "YoloSeg's labels (slice by slice in volumes), loss and cross patches, nnU-Net 2d",
        "yoloseg",
        "OneShotTrainerYoloSeg",
        ignore=True,
        configuration="2d",
        rival=True,
    ),
    "ssl_medsam2_once": Method("SSL-MedSAM2's labels, then nnU-Net", "ssl_medsam2", rival=True),
    "ssl_medsam2": Method("SSL-MedSAM2: the same, relabelled once by nnU-Net", "ssl_medsam2", replaced=1, rival=True),
    "oneseg": Method("OneSeg's labels from the one case, then nnU-Net", "oneseg", rival=True),
    "oneseg_slices": Method("OneSeg's labels from one slice a volume, then nnU-Net", "oneseg_slices", rival=True),
    "ours": Method("ours", "ours", "OneShotTrainer", ignore=True, rounds=1),
    "ours_3_rounds": Method("ours, three rounds", "ours", "OneShotTrainer", ignore=True, rounds=3),
    "ours_no_refinement": Method("ours without refinement", "ours", "OneShotTrainer", ignore=True),
    "ours_no_relay": Method("ours without relays", "sam2_registration", "OneShotTrainer", ignore=True, rounds=1),
    "ours_no_relay_3_rounds": Method(
        "ours without relays, three rounds", "sam2_registration", "OneShotTrainer", ignore=True, rounds=3
    ),
    "ours_no_relay_no_refinement": Method(
        "ours without relays and refinement", "sam2_registration", "OneShotTrainer", ignore=True
    ),
    "ours_no_sam2": Method("ours without SAM2", "relay", "OneShotTrainer", ignore=True, rounds=1),
    "ours_registration": Method(
        "ours from registration alone", "registration", "OneShotTrainer", ignore=True, rounds=1
    ),
    "ours_registration_no_refinement": Method(
        "ours from registration alone, without refinement", "registration", "OneShotTrainer", ignore=True
    ),
    "ours_slices": Method("ours, from one slice a volume", "slices", "OneShotTrainer", ignore=True, rounds=1),
    "ours_no_fusion": Method("ours, SAM2 alone", "sam2", "OneShotTrainer", ignore=True, rounds=1),
    "no_label_in_divergence": Method(
        "registration, consistency alone in divergence", "registration", "OneShotTrainerConsistency", ignore=True
    ),
    "stock_with_ignore": Method("nnU-Net on our labels with ignore", "ours", ignore=True),
    "ours_labels": Method("our labels, as they are", "ours", trainer=None),
    "ours_stock": Method("our labels, then nnU-Net", "ours"),
    "ours_stock_again": Method("our labels of round 0, then nnU-Net, trained once more", "ours", again=1),
}
