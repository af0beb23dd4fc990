"""What `run` is told of training, looked at before the hours of labelling rather than after them."""

from __future__ import annotations

from nnunet_oneshot import nnunet
from nnunet_oneshot.dataset import RawDataset
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.output import check_writable
from nnunet_oneshot.second_opinion import AS_BEFORE, check_sam2
from nnunet_oneshot.store import Store
from sam2_propagation.checkpoints import check_device

PLANNED = ("2d", "3d_fullres", "3d_lowres")
"""Configurations of one stage that nnU-Net plans by itself."""


def check_training(
    dataset: RawDataset,
    store: Store,
    configuration: str,
    plans: str,
    *,
    plans_given: bool,
    self_opinion: str | None,
    device: str,
    overwrite: bool,
) -> None:
    """Check what trains on labels that are not made yet; arguments are those of `run` and `refine`.

    Args:
        dataset: whose images are labelled.
        store: the output dataset, as far as it exists.
        configuration: nnU-Net configuration.
        plans: plans identifier, `plans_given` where a user named it.
        plans_given: the plans are not made by `refine`.
        self_opinion: SAM2 weights of a second opinion; None and "auto" need no check.
        device: cpu, cuda or mps.
        overwrite: the output dataset is replaced, with all that nnU-Net derived from it.

    Raises:
        OneShotError: plans that cannot be there when labels are, a configuration that they lack, or no permission to
            write models.
        PropagationError: SAM2 weights or a device that cannot be had.
    """
    # Registration and relays label without it, so that training alone would find that it is not there.
    check_device(device)
    name = store.folder.name
    check_writable(nnunet.root("nnUNet_results") / name)
    there = nnunet.plans_file(name, plans).is_file() and not (overwrite and store.folder.exists())
    if there:
        nnunet.check_configuration(name, plans, configuration)
    elif plans_given:
        raise OneShotError(_no_plans(dataset, store, configuration, plans))
    else:
        _check_planned(dataset, configuration)
    if self_opinion not in (None, AS_BEFORE):
        check_sam2(self_opinion, device)


def _no_plans(dataset: RawDataset, store: Store, configuration: str, plans: str) -> str:
    number = store.folder.name[7:10]
    return (
        f"expected plans '{plans}' of {store.folder.name}, found none, for its labels are not made yet; leave out -p, "
        f"or go step by step: nnUNetv2_oneshot_propagate -d {dataset.id} -o {number}, then "
        f"nnUNetv2_plan_and_preprocess -d {number} -pl PLANNER -c {configuration}, then "
        f"nnUNetv2_oneshot_refine -d {number} -c {configuration} -p {plans}"
    )


def _check_planned(dataset: RawDataset, configuration: str) -> None:
    if configuration not in PLANNED:
        raise OneShotError(
            f"expected a configuration that nnU-Net plans, {', '.join(PLANNED)}, found {configuration}; choose one of "
            "these with -c, or make plans that have it and name them by -p"
        )
    # Whether 3d_lowres is planned depends on how large the images are, which planning alone can tell.
    if configuration != "2d" and all(dataset.image_geometry(case)[0][0] == 1 for case in dataset.cases):
        raise OneShotError(
            f"expected volumes for -c {configuration}, found images of one slice alone in {dataset.name}; use -c 2d"
        )
