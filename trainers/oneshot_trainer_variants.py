"""The trainers of presets `small` and `tiny`, the same training, shorter; and other losses in divergence."""

from __future__ import annotations

import torch
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from oneshot_trainer import OneShotTrainer, WholeCheckpoints

from nnunet_oneshot.bfloat16 import VARIABLE, compute_in_bfloat16, pays
from nnunet_oneshot.settings import PRESETS, LossSettings, Schedule


class _Shortened(WholeCheckpoints):
    """A schedule in place of nnU-Net's 1000 epochs; what nnU-Net sets in __init__ can only be changed there.

    In so few iterations nnU-Net's SGD hardly leaves background (Dice 0 on phantoms after the 200 of `tiny`, where AdamW
    at the same rate reaches .8: benchmarks/short_training.py), so the shortened trainers, the stock one among them, use
    AdamW with nnU-Net's own learning rate, weight decay and poly schedule. On a CPU where that is faster they compute
    in bfloat16, as nnU-Net computes in half precision on a GPU.
    """

    schedule: Schedule

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008  nnU-Net's own signature
    ):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs = self.schedule.epochs
        self.num_iterations_per_epoch = self.schedule.iterations
        self.num_val_iterations_per_epoch = self.schedule.validation_iterations
        self.save_every = self.schedule.save_every

    def initialize(self):
        super().initialize()
        if pays(self.device):
            compute_in_bfloat16(self.network)
            self.print_to_log_file(f"Computing in bfloat16; {VARIABLE}=0 is float32")

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.network.parameters(), self.initial_lr, weight_decay=self.weight_decay)
        return optimizer, PolyLRScheduler(optimizer, self.initial_lr, self.num_epochs)

    def perform_actual_validation(self, save_probabilities: bool = False):
        """nnU-Net's; left out after training on `all`, where it would predict every training case for no new figure.

        `nnUNetv2_train --val` and `--npz` still run it, and so does a first stage, whose predictions the cascade needs.
        """
        just_trained = self.dataloader_train is not None
        needed = save_probabilities or self.configuration_manager.next_stage_names is not None
        if self.fold == "all" and just_trained and not needed:
            self.print_to_log_file("Fold all validates on its training cases: skipped, run again with --val if wanted")
            return
        super().perform_actual_validation(save_probabilities)


class OneShotTrainer_small(_Shortened, OneShotTrainer):
    """OneShotTrainer for two CPU cores: 30 epochs of 50 iterations."""

    schedule = PRESETS["small"].schedule


class OneShotTrainer_tiny(_Shortened, OneShotTrainer):
    """OneShotTrainer for demonstrations and tests: 10 epochs of 20 iterations."""

    schedule = PRESETS["tiny"].schedule


class nnUNetTrainer_small(_Shortened):
    """nnUNetTrainer on the schedule of OneShotTrainer_small."""

    schedule = PRESETS["small"].schedule


class nnUNetTrainer_tiny(_Shortened):
    """nnUNetTrainer on the schedule of OneShotTrainer_tiny."""

    schedule = PRESETS["tiny"].schedule


class _NotMirrored(nnUNetTrainer):
    """No mirrored images in training, and none in prediction, as nnU-Net's nnUNetTrainerNoMirroring.

    For structures that differ by their place alone, which mirrored images make hard to learn (benchmarks/mirroring.py).
    """

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self):
        rotation, dummy_2d, size, _ = super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        self.inference_allowed_mirroring_axes = None
        return rotation, dummy_2d, size, None


class OneShotTrainerNoMirroring(OneShotTrainer, _NotMirrored):
    """OneShotTrainer that mirrors nothing."""


class OneShotTrainerNoMirroring_small(_Shortened, OneShotTrainerNoMirroring):
    """OneShotTrainerNoMirroring on the schedule of OneShotTrainer_small."""

    schedule = PRESETS["small"].schedule


class OneShotTrainerNoMirroring_tiny(_Shortened, OneShotTrainerNoMirroring):
    """OneShotTrainerNoMirroring on the schedule of OneShotTrainer_tiny."""

    schedule = PRESETS["tiny"].schedule


class nnUNetTrainerNoMirroring_small(_Shortened, _NotMirrored):
    """nnUNetTrainerNoMirroring on the schedule of OneShotTrainer_small."""

    schedule = PRESETS["small"].schedule


class nnUNetTrainerNoMirroring_tiny(_Shortened, _NotMirrored):
    """nnUNetTrainerNoMirroring on the schedule of OneShotTrainer_tiny."""

    schedule = PRESETS["tiny"].schedule


class OneShotTrainerConsistency(OneShotTrainer):
    """Divergence has no label: consistency with one other view is all that it teaches."""

    loss_settings = LossSettings(guess_share=0.0)


class OneShotTrainerThreePasses(OneShotTrainer):
    """YoloSeg's three full passes: each view learns from the labels, all pairs of views are compared."""

    loss_settings = LossSettings(guess_share=0.0, full_passes=3)


class OneShotTrainerYoloSeg(OneShotTrainer):
    """YoloSeg's loss and augmentation in nnU-Net: three full passes and cross patches, no label in divergence."""

    loss_settings = LossSettings(guess_share=0.0, full_passes=3, cross_patch=0.2)


class OneShotTrainerMeanTeacher(OneShotTrainer):
    """Divergence learns what a running mean of the network's weights says of another view."""

    loss_settings = LossSettings(guess_share=0.0, teacher_decay=0.99)


class OneShotTrainerConsistency_small(_Shortened, OneShotTrainerConsistency):
    """OneShotTrainerConsistency on the schedule of OneShotTrainer_small."""

    schedule = PRESETS["small"].schedule


class OneShotTrainerYoloSeg_small(_Shortened, OneShotTrainerYoloSeg):
    """OneShotTrainerYoloSeg on the schedule of OneShotTrainer_small."""

    schedule = PRESETS["small"].schedule
