"""OneShotTrainer: nnU-Net's trainer for labels that propagation made. Hooks only; what they call is in nnunet_oneshot.

nnU-Net finds this file by name through nnUNet_extTrainer, so imports are absolute.
"""

from __future__ import annotations

import os
from os.path import isfile, join
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.distributed as dist
from batchgenerators.utilities.file_and_folder_operations import load_pickle
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from nnunetv2.paths import nnUNet_raw
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class, nnUNetBaseDataset
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from nnunet_oneshot.case_selection import FOLDS, by_author, dealt_split, drawn_by_weight, usable_split, with_share
from nnunet_oneshot.cross_patch import CrossPatch, before_targets, cell_size
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.filled_labels import fill_labels, filled_folder
from nnunet_oneshot.losses import DualComponentLoss, ShownViews, divergence, ramp, show_views
from nnunet_oneshot.model_checkpoints import check_trainer
from nnunet_oneshot.next_stage import predict_for_next_stages
from nnunet_oneshot.settings import LossSettings, parse_block
from nnunet_oneshot.training_cases import Crop, TrainingCases, any_ignored
from nnunet_oneshot.training_views import ViewChoice, rotation_obstacle


class WholeCheckpoints(nnUNetTrainer):
    """nnUNetTrainer whose checkpoints are whole or not there, so that a run killed while writing one can resume."""

    def save_checkpoint(self, filename: str) -> None:
        if self.local_rank != 0 or self.disable_checkpointing:
            super().save_checkpoint(filename)
            return
        super().save_checkpoint(f"{filename}.part")
        os.replace(f"{filename}.part", filename)

    def load_checkpoint(self, filename_or_checkpoint: dict | str) -> None:
        """nnU-Net's, but another trainer's checkpoint is refused: its schedule and optimizer are not this one's."""
        if isinstance(filename_or_checkpoint, str):
            remedy = "move it away, or give it as -pretrained_weights"
            check_trainer(filename_or_checkpoint, type(self).__name__, remedy)
        super().load_checkpoint(filename_or_checkpoint)


class OneShotTrainer(WholeCheckpoints):
    """Dual-component loss and trust in cases, as the "oneshot" block of dataset.json says.

    With its default settings it trains exactly as nnUNetTrainer without that block, without an ignore label, or where
    every case is annotated and no voxel is ignored.
    """

    loss_settings = LossSettings()

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008  nnU-Net's own signature
    ):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.block = parse_block(dataset_json)
        self.dual_loss: DualComponentLoss | None = None
        self._teacher: AveragedModel | None = None
        self.view_choice = ViewChoice(len(self.configuration_manager.patch_size), (), False)
        self._drawn_size = tuple(self.configuration_manager.patch_size)
        self._apart: dict[str, list[dict]] = {}
        self._all_labelled = False
        self._random = Random(12345 + self.local_rank)
        self._iteration = 0

    def _build_loss(self) -> nn.Module:
        loss = super()._build_loss()
        ignore = self.label_manager.ignore_label
        if self.block is None or ignore is None:
            return loss
        self.dual_loss = DualComponentLoss(loss, ignore, self.label_manager.has_regions)
        return self.dual_loss

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self):
        augmentation = super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        rotation, _, drawn, mirror_axes = augmentation
        self._drawn_size = tuple(int(size) for size in drawn)
        obstacle = self._rotation_obstacle(rotation)
        self.view_choice = ViewChoice(
            len(self.configuration_manager.patch_size), tuple(mirror_axes or ()), obstacle is None
        )
        if self.dual_loss is not None:
            turns = "with rotations by 90 degrees" if obstacle is None else f"without rotations: {obstacle}"
            self.print_to_log_file(f"Consistency views: flips along axes {self.view_choice.mirror_axes}, {turns}")
        return augmentation

    def get_training_transforms(self, *args, **kwargs):
        """nnU-Net's; static there, but called on the trainer, whose settings and cases the cross patches need."""
        transforms = super().get_training_transforms(*args, **kwargs)
        annotated = self._annotated_in_training() if self.dual_loss is not None else []
        if self.loss_settings.cross_patch > 0 and annotated:
            place = before_targets(transforms)
            loader = self._reference_loader(annotated, ComposeTransforms(transforms.transforms[:place]))
            transforms.transforms.insert(place, self._cross_patch(loader))
        return transforms

    def do_split(self):
        if self.dataset_class is None:
            self.dataset_class = infer_dataset_class(self.preprocessed_dataset_folder)
        cases = self.dataset_class.get_identifiers(self.preprocessed_dataset_folder)
        block = parse_block(self.dataset_json, cases)
        annotated = block.annotated if block else ()
        usable = sorted(set(cases) - set(block.left_out if block else ())) or cases
        nnunets_own = len(cases) >= FOLDS and (block is None or set(usable) <= set(annotated))
        if self.fold == "all" or nnunets_own or self._has_splits():
            train, validation = super().do_split()
        else:
            self.print_to_log_file("No splits_final.json: dealing the cases out over the folds")
            train, validation = dealt_split(usable, self.fold, annotated)
        return (train, validation) if block is None else usable_split(train, validation, block)

    def get_tr_and_val_datasets(self):
        training, validation = super().get_tr_and_val_datasets()
        if self.block is None:
            return training, validation
        weighted = drawn_by_weight(training.identifiers, self.block.case_weight)
        training.identifiers = with_share(weighted, self.block.annotated, self.loss_settings.annotated_share)
        if self.label_manager.has_ignore_label:
            self._check_supervision(training.identifiers)
        self._all_labelled = self._are_all_labelled(training, {*training.identifiers, *validation.identifiers})
        if self.dual_loss is None or self._all_labelled:
            return training, validation
        self._fill_labels(sorted(set(training.identifiers)))
        final = tuple(self.configuration_manager.patch_size)
        return (
            self._beside_ignore(training, Crop(self._drawn_size, final), self.loss_settings.guess_share),
            self._beside_ignore(validation, Crop(final, final), 0.0),
        )

    def on_train_start(self):
        super().on_train_start()
        self.print_to_log_file(self._introduction())
        if self.is_ddp and self.block is not None:
            self.print_to_log_file("DDP: pseudo dice against annotated and against pseudo labels is not logged apart")

    def on_train_epoch_start(self):
        super().on_train_epoch_start()
        self._iteration = 0

    def train_step(self, batch: dict) -> dict:
        weight = self._consistency_weight()
        self._iteration += 1
        if self.dual_loss is None:
            return super().train_step(batch)
        # The target is still on the CPU here, so that looking at it does not wait for the GPU.
        mask = self._divergence(batch["target"])
        samples = mask.flatten(1).any(1).nonzero()[:, 0]
        due = weight > 0 and self._iterations_done() % self.loss_settings.every == 0
        if due and self._any_divergence(samples):
            batch = {**batch, "data": batch["data"].to(self.device, non_blocking=True)}
            if (shown := self._shown_views(batch["data"], samples, weight)) is not None:
                self.dual_loss.announce(shown)
        result = super().train_step(batch)
        if self._teacher is not None:
            self._teacher.update_parameters(self._bare_network())
        term = self.dual_loss.last_consistency
        return {
            **result,
            "supervised": self.dual_loss.last_supervised.item(),
            "consistency": 0.0 if term is None else term.item(),
            "divergence": mask.float().mean().item(),
        }

    def _any_divergence(self, samples: Tensor) -> bool:
        """Whether the batch, or with full passes under DDP any process's batch, has samples with divergence.

        Each full pass calls nnU-Net's loss, whose batch Dice gathers from all processes: all make them, or none.
        """
        if not self.is_ddp or self.loss_settings.full_passes == 1:
            return len(samples) > 0
        most = torch.tensor(len(samples), device=self.device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return bool(most > 0)

    def _shown_views(self, data: Tensor, samples: Tensor, weight: float) -> ShownViews | None:
        """What the batch's output is compared with; None where the configuration allows no view."""
        passes = self.loss_settings.full_passes
        views = self.view_choice.draw(self._random, max(1, passes - 1))
        if not views:
            return None
        return show_views(self._asked_about_views(), data, views, samples, weight, learn=passes > 1)

    def _asked_about_views(self) -> nn.Module:
        """The network itself, or its teacher, which begins as a copy when it is first asked."""
        decay = self.loss_settings.teacher_decay
        if decay == 0:
            return self.network.module if self.is_ddp else self.network
        if self._teacher is None:
            self._teacher = AveragedModel(self._bare_network(), multi_avg_fn=get_ema_multi_avg_fn(decay))
        return self._teacher

    def _bare_network(self) -> nn.Module:
        network = self.network.module if self.is_ddp else self.network
        return network._orig_mod if isinstance(network, OptimizedModule) else network

    def on_train_epoch_end(self, train_outputs: list[dict]):
        super().on_train_epoch_end(train_outputs)
        if self.dual_loss is None:
            return
        supervised, term, share = (
            float(np.mean([output[key] for output in train_outputs]))
            for key in ("supervised", "consistency", "divergence")
        )
        # Not called divergence: where best guesses fill it, there is less without a label than there is divergence.
        self.print_to_log_file(
            f"supervised loss {supervised:.4f}, consistency {term:.4f} (weight {self._consistency_weight():.3f}), "
            f"{share:.2%} of voxels without a label"
        )

    def _annotated_in_training(self) -> list[str]:
        training, _ = self.do_split()
        return sorted(set(training) & set(self.block.annotated)) if self.block else []

    def _reference_loader(self, cases: list[str], transforms: ComposeTransforms) -> nnUNetDataLoader:
        """nnU-Net's loader of one annotated sample around foreground."""
        previous = self.folder_with_segs_from_previous_stage
        dataset = self.dataset_class(
            self.preprocessed_dataset_folder, cases, folder_with_segs_from_previous_stage=previous
        )
        final = tuple(self.configuration_manager.patch_size)
        return nnUNetDataLoader(dataset, 1, self._drawn_size, final, self.label_manager, 1.0, transforms=transforms)

    def _cross_patch(self, references: nnUNetDataLoader) -> CrossPatch:
        plan, settings = self.configuration_manager, self.loss_settings
        size = cell_size(plan.patch_size, plan.spacing[-len(plan.patch_size) :])
        ignore = self.label_manager.ignore_label
        return CrossPatch(references, ignore, size, settings.cross_patch, settings.cross_patch_labels)

    def _beside_ignore(self, dataset: nnUNetBaseDataset, crop: Crop, share: float) -> TrainingCases:
        key = (-1, *self.label_manager.all_labels)
        return TrainingCases(dataset, key, crop, filled_folder(Path(self.preprocessed_dataset_folder)), share)

    def _fill_labels(self, cases: list[str]) -> None:
        """Best guesses for divergence, where the raw dataset is at hand; under DDP every process makes its part.

        The processes wait for each other afterwards, for no longer than NCCL lets them: so none makes them all.
        """
        if self.loss_settings.guess_share > 0:
            cases = self._dealt(cases)
            without = fill_labels(
                Path(self.preprocessed_dataset_folder),
                Path(nnUNet_raw or "") / self.plans_manager.dataset_name / "pseudoTr" / "fused",
                cases,
                self.plans_manager,
                self.configuration_manager,
                self.dataset_json["file_ending"],
                self.label_manager.ignore_label,
                get_allowed_n_proc_DA(),
                "_".join(map(str, self._identity())),
            )
            whose = " of this process" if self.is_ddp else ""
            filled = len(cases) - len(without)
            self.print_to_log_file(f"Best guesses in divergence for {filled} of {len(cases)} cases{whose}")
        if self.is_ddp:
            dist.barrier()

    def _dealt(self, cases: list[str]) -> list[str]:
        """This process's part under DDP, else all."""
        return cases[self.local_rank :: dist.get_world_size()] if self.is_ddp else cases

    def _identity(self) -> tuple[str | int, ...]:
        """What no other process that trains at the same time shares, and this one has again when it is run again."""
        plans, configuration = self.plans_manager.plans_name, self.configuration_name
        return type(self).__name__, plans, configuration, self.fold, self.local_rank

    def on_validation_epoch_start(self):
        super().on_validation_epoch_start()
        self._apart = {}

    def validation_step(self, batch: dict) -> dict:
        """nnU-Net's; where a batch holds a person's labels and pseudo labels, once more for the former alone.

        Not under DDP, where nnU-Net's batch Dice gathers from all processes in every call.
        """
        if self.block is None or self.dual_loss is None or self.is_ddp:
            return super().validation_step(batch)
        authors = by_author(batch["keys"], self.block.annotated)
        if len(authors) == 2:
            return self._validate_both(batch, authors["pseudo"])
        result = super().validation_step(batch)
        self._apart.setdefault(*authors, []).append(result)
        return result

    def _validate_both(self, batch: dict, pseudo: list[int]) -> dict:
        # Ignored rather than taken out: a compiled network is made anew for every other size of a batch. Hidden before
        # nnU-Net's step, which changes the target.
        hidden = self._hidden(batch["target"], torch.tensor(pseudo))
        result = super().validation_step(batch)
        drawn = super().validation_step({**batch, "target": hidden})
        self._apart.setdefault("annotated", []).append(drawn)
        counts = {key: result[key] - drawn[key] for key in ("tp_hard", "fp_hard", "fn_hard")}
        self._apart.setdefault("pseudo", []).append(counts)
        return result

    def _hidden(self, target: Tensor | list[Tensor], samples: Tensor) -> Tensor | list[Tensor]:
        """A copy of a target in which the samples are ignored."""
        if isinstance(target, list):
            return [self._hidden(level, samples) for level in target]
        hidden = target.clone()
        if self.label_manager.has_regions:
            hidden[samples, -1] = 1
        else:
            hidden[samples] = self.label_manager.ignore_label
        return hidden

    def on_validation_epoch_end(self, val_outputs: list[dict]):
        super().on_validation_epoch_end(val_outputs)
        for author, results in sorted(self._apart.items()):
            whose = "pseudo labels (not the truth)" if author == "pseudo" else "annotated labels"
            self.print_to_log_file(f"Pseudo dice against {whose}: {_dice(results)}")

    def perform_actual_validation(self, save_probabilities: bool = False):
        if self.block is None:
            super().perform_actual_validation(save_probabilities)
            return
        training, validation = self.do_split()
        annotated = set(self.block.annotated)
        pseudo = len(set(validation) - annotated)
        self.print_to_log_file(f"{pseudo} of {len(validation)} validation cases have pseudo labels (not the truth)")
        super().perform_actual_validation(save_probabilities)
        never = sorted((set(training) & annotated) - set(validation))
        if self.configuration_manager.next_stage_names:
            predict_for_next_stages(self, self._dealt(never))
            if self.is_ddp:
                dist.barrier()

    def _has_splits(self) -> bool:
        return isfile(join(self.preprocessed_dataset_folder_base, "splits_final.json"))

    def _divergence(self, target: Tensor | list[Tensor]) -> Tensor:
        finest = target[0] if isinstance(target, list) else target
        return divergence(finest, self.label_manager.ignore_label, self.label_manager.has_regions)

    def _consistency_weight(self) -> float:
        return ramp(self._iterations_done() / (self.num_iterations_per_epoch * self.num_epochs), self.loss_settings)

    def _iterations_done(self) -> int:
        """Of the whole training, also of a resumed one."""
        return self.current_epoch * self.num_iterations_per_epoch + self._iteration

    def _rotation_obstacle(self, augmentation: tuple[float, float]) -> str | None:
        plan = self.configuration_manager
        return rotation_obstacle(plan.patch_size, plan.spacing, plan.pool_op_kernel_sizes, augmentation)

    def _are_all_labelled(self, dataset: nnUNetBaseDataset, cases: set[str]) -> bool:
        """Whether every case is annotated and no voxel is ignored; labels are read only where every case is."""
        if self.dual_loss is None or self.block is None or not cases <= set(self.block.annotated):
            return False
        return not any_ignored(dataset, sorted(cases), self.label_manager.ignore_label)

    def _check_supervision(self, cases: list[str]) -> None:
        """nnU-Net lists the voxels of each class beside each case: one labelled voxel anywhere is enough to train."""
        files = (join(self.preprocessed_dataset_folder, f"{case}.pkl") for case in dict.fromkeys(cases))
        if not any(len(voxels) for file in files for voxels in load_pickle(file)["class_locations"].values()):
            raise OneShotError(
                f"expected a labelled voxel in at least one of {len(set(cases))} training cases, found only the ignore "
                "label; propagate labels again or annotate a case"
            )

    def _introduction(self) -> str:
        if self.block is None:
            return 'dataset.json has no "oneshot" block: training exactly as nnUNetTrainer does'
        if self.dual_loss is None:
            return "dataset.json has no ignore label, so there is no divergence: training with nnU-Net's loss alone"
        if self._all_labelled:
            return "every case is annotated and no voxel is ignored: training as nnUNetTrainer does"
        return (
            f"Round {self.block.round}: {len(self.block.annotated)} annotated, {len(self.block.left_out)} left out; "
            f"in divergence the best guess for {self.loss_settings.guess_share:.0%} of the draws; without one, "
            f"{self._compared()}"
        )

    def _compared(self) -> str:
        """What divergence without a best guess teaches, as far as the configuration has views to compare."""
        settings, views = self.loss_settings, self.view_choice.count
        if settings.end_weight == 0:
            return "nothing"
        if views == 0:
            return "nothing: this configuration has neither flips nor rotations, so no views to compare"
        passes = min(settings.full_passes, views + 1)
        what = f"consistency of {passes} full passes" if passes > 1 else "consistency of one view"
        fewer = (
            "" if passes == settings.full_passes else f" ({settings.full_passes} asked for, there are no more views)"
        )
        teacher = f" and a running mean of weights (decay {settings.teacher_decay})" if settings.teacher_decay else ""
        every = "" if settings.every == 1 else f" every {settings.every} iterations"
        return f"{what}{fewer}{teacher}{every}, weight rising to {settings.end_weight}"


def _dice(results: list[dict]) -> list[float]:
    """Dice of each class or region over all samples; NaN where a class is neither there nor predicted."""
    tp, fp, fn = (np.sum([result[key] for result in results], axis=0) for key in ("tp_hard", "fp_hard", "fn_hard"))
    everything = 2 * tp + fp + fn
    return [
        round(float(value), 4)
        for value in np.divide(2 * tp, everything, np.full(len(tp), np.nan), where=everything > 0)
    ]
