"""The trainer of preset `tiny` and nnU-Net's of one epoch, shorter still: for what is around a training, not in it."""

from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

from nnunet_oneshot.settings import Schedule


class OneShotTrainer_tiny(recursive_find_trainer_class_by_name("OneShotTrainer_small")):
    """Found before ours, where its folder stands first in nnUNet_extTrainer."""

    schedule = Schedule(2, 4, 1, 1)


class nnUNetTrainer_1epoch(recursive_find_trainer_class_by_name("nnUNetTrainer")):
    """nnU-Net's has 250 iterations."""

    def initialize(self) -> None:
        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 1, 4, 1
        super().initialize()
