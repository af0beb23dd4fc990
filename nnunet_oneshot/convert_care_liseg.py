"""From the CARE-Liver (LiQA) folders of MICCAI's CARE challenge to one nnU-Net raw dataset a modality.

The layout, as the challenge's validation instructions and entrants' public code show it (the data are not public;
github.com/naisops/SSL-MedSAM2 at bed5b3e, github.com/mileywang3061/Care-Liver, the README of github.com/pazjin/FibUCL):

    LiQA_training_data/Vendor_A/1009-A-S4/      Vendor_A, Vendor_B1, Vendor_B2 (and Vendor_C in later releases)
        T1.nii.gz T2.nii.gz DWI_800.nii.gz GED1.nii.gz GED2.nii.gz GED3.nii.gz GED4.nii.gz      some are missing
        mask_GED4.nii.gz                        of 10 patients a vendor; the liver is what is above 0

A patient's folder is NUMBER-VENDOR-STAGE in training and NUMBER-VENDOR in validation data, with - or _ between. The
stage (S1 to S4) is a diagnosis and gets no place in case names. A case is `VENDOR_NUMBER` in every modality's dataset,
so a patient has the same name everywhere; `care_liseg.json` in each dataset says where each case comes from.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnunet_oneshot.conversion import (
    Conversion,
    DatasetPlan,
    Step,
    carry_out,
    dataset_name,
    label_like,
    read_volume,
    rewrite,
    visible_files,
)
from nnunet_oneshot.errors import OneShotError

MODALITIES = ("GED4", "GED1", "GED2", "GED3", "T1", "T2", "DWI")
"""In the order of the datasets' ids."""
LABELS = {"background": 0, "liver": 1}
_PATIENT = re.compile(r"(?P<number>\d+)[-_ ]?(?P<vendor>[A-Z]\d?)?(?:[-_ ]S\d)?", re.IGNORECASE)
_VENDOR = re.compile(r"vendor[-_ ]?(?P<vendor>[A-Z]\d?)", re.IGNORECASE)
_VOLUME = re.compile(
    r"(?P<mask>(?:mask|label|seg|gt)[-_ ])?(?P<modality>GED[-_ ]?[1-4]|T[12]|DWI)"
    r"(?:(?<=T[12])WI?|(?<=DWI)[-_ ]?b?(?P<b>\d+))?"
    r"(?P<after>[-_ ](?:mask|label|seg|gt))?",
    re.IGNORECASE,
)
_ENDINGS = (".nii.gz", ".nii")


@dataclass(frozen=True)
class Volume:
    """One file of a patient, as its name tells."""

    path: Path
    case: str
    modality: str
    mask: bool
    b_value: int = 0


def convert_care_liseg(
    source: Path,
    dataset_id: int,
    *,
    modalities: Sequence[str] | None = None,
    support: str | None = None,
    test: Path | None = None,
    dry_run: bool = False,
) -> Conversion:
    """Make one dataset a modality, ids from `dataset_id` on in the order of `MODALITIES`.

    Args:
        source: folder of the training data; vendors' and patients' folders are found below it at any depth.
        modalities: which ones; all that are there when None.
        support: a modality whose annotated cases are added, as `CASE_MODALITY`, to datasets without a label of their
            own (only GED4 has labels in the challenge).
        test: folder of validation or test data of the same layout, for imagesTs.
        dry_run: write nothing; `Conversion.lines(verbose=True)` tells every file.

    Raises:
        OneShotError: not that layout, an unknown modality, two files for one place, or a dataset id is taken.
    """
    found, notes = _find(Path(source))
    held_out, more = _find(Path(test)) if test is not None else ([], [])
    wanted = _wanted(found, modalities, support)
    plans = []
    for number, modality in enumerate(wanted):
        title = dataset_name(dataset_id + number, f"care_liseg_{modality}")
        plan, said = _plan(title, modality, found, held_out, support)
        plans.append(plan)
        notes += said
    return carry_out(plans, [*notes, *more], dry_run=dry_run)


def parse_volume(path: Path, root: Path) -> Volume | None:
    """What a file is, by its name and its folders'; None for files of other kinds.

    Upper and lower case, - and _, T1WI, DWI without or with any b-value, GED_4, mask before or after, and .nii are
    understood.
    """
    ending = next((e for e in _ENDINGS if path.name.lower().endswith(e)), None)
    if ending is None:
        return None
    match = _VOLUME.fullmatch(path.name[: -len(ending)])
    case = _case(path.parent, root)
    if match is None or case is None:
        return None
    modality = re.sub(r"[-_ ]", "", match["modality"]).upper()
    mask = match["mask"] is not None or match["after"] is not None
    return Volume(path, case, modality, mask, int(match["b"] or 0))


def _case(folder: Path, root: Path) -> str | None:
    """`VENDOR_NUMBER` of a patient's folder."""
    patient = _PATIENT.fullmatch(folder.name)
    if patient is None:
        return None
    vendor = patient["vendor"]
    if vendor is None:
        above = [_VENDOR.search(part) for part in reversed(folder.relative_to(root).parts)]
        vendor = next((m["vendor"] for m in above if m), None)
    return None if vendor is None else f"{vendor.upper()}_{patient['number']}"


def _find(root: Path) -> tuple[list[Volume], list[str]]:
    """The volumes below a folder, and notes of what was passed over."""
    if not root.is_dir():
        raise OneShotError(f"expected the folder of the CARE-Liver data, found no folder {root}; check it")
    files = list(visible_files(root))
    volumes = [(path, parse_volume(path, root)) for path in files]
    known = [volume for _, volume in volumes if volume is not None]
    if not any(not volume.mask for volume in known):
        raise OneShotError(
            f"expected Vendor_X/NUMBER-X-STAGE/GED4.nii.gz and the like below {root}, found {len(files)} files and "
            "none of that kind; give the unpacked LiQA_training_data folder"
        )
    unknown = [path for path, volume in volumes if volume is None]
    strange = [path for path in unknown if path.name.lower().endswith(_ENDINGS)]
    others = [path for path in unknown if not path.name.lower().endswith(_ENDINGS)]
    notes = [f"not understood and passed over: {path.relative_to(root)}" for path in strange]
    if others:
        count = f"{len(others)} other file{'s' if len(others) > 1 else ''}"
        notes.append(f"{count} passed over (for example {others[0].relative_to(root)})")
    chosen, several = _one_each(known)
    return chosen, notes + several


def _one_each(volumes: Sequence[Volume]) -> tuple[list[Volume], list[str]]:
    """One volume of each kind a patient: the highest b-value where there are several DWI."""
    chosen: dict[tuple[str, str, bool], Volume] = {}
    notes = []
    for volume in sorted(volumes, key=lambda v: (v.case, v.modality, v.mask, -v.b_value, str(v.path))):
        key = (volume.case, volume.modality, volume.mask)
        first = chosen.setdefault(key, volume)
        if first is volume:
            continue
        if first.b_value == volume.b_value:
            raise OneShotError(
                f"expected one {volume.modality} of patient {volume.case}, found {first.path} and {volume.path}; "
                "remove one"
            )
        notes.append(f"{volume.case}: {first.path.name} was taken, {volume.path.name} passed over")
    return list(chosen.values()), notes


def _wanted(found: Sequence[Volume], modalities: Sequence[str] | None, support: str | None) -> list[str]:
    there = [m for m in MODALITIES if any(v.modality == m and not v.mask for v in found)]
    asked = [m.upper() for m in modalities] if modalities is not None else there
    for modality in [*asked, *([support.upper()] if support else [])]:
        if modality not in there:
            raise OneShotError(f"expected modalities among {', '.join(there)}, found {modality}; choose among them")
    return [m for m in MODALITIES if m in asked]


def _plan(
    title: str, modality: str, found: Sequence[Volume], held_out: Sequence[Volume], support: str | None
) -> tuple[DatasetPlan, list[str]]:
    """One modality's dataset."""
    images, masks = _of(found, modality, False), _of(found, modality, True)
    names = {case: case for case in images}
    notes = [f"{modality}: {case} has a mask and no image" for case in sorted(set(masks) - set(images))]
    if support and not masks and support.upper() != modality:
        kind = support.upper()
        extra = {case: volume for case, volume in _of(found, kind, True).items() if case in _of(found, kind, False)}
        images |= {f"{case}_{kind}": _of(found, kind, False)[case] for case in extra}
        names |= {f"{case}_{kind}": case for case in extra}
        masks = {f"{case}_{kind}": volume for case, volume in extra.items()}
    if not masks:
        notes.append(f"{modality}: no case is annotated; -support GED4 adds annotated cases of that modality")
    steps = [_image_step("imagesTr", name, volume) for name, volume in sorted(images.items())]
    steps += [_label_step(name, images[name], mask) for name, mask in sorted(masks.items()) if name in images]
    tests = _of(held_out, modality, False)
    steps += [_image_step("imagesTs", name, volume) for name, volume in sorted(tests.items())]
    origin = {name: {"patient": names[name], "folder": _folder(v), "file": v.path.name} for name, v in images.items()}
    json = {"channel_names": {"0": "MRI"}, "labels": LABELS, "numTraining": len(masks), "file_ending": ".nii.gz"}
    return DatasetPlan(title, tuple(steps), json, {"care_liseg.json": {"modality": modality, "cases": origin}}), notes


def _of(volumes: Sequence[Volume], modality: str, mask: bool) -> dict[str, Volume]:
    return {v.case: v for v in volumes if v.modality == modality and v.mask == mask}


def _folder(volume: Volume) -> str:
    return "/".join(volume.path.parent.parts[-2:])


def _image_step(folder: str, name: str, volume: Volume) -> Step:
    return Step(volume.path, f"{folder}/{name}_0000.nii.gz", rewrite)


def _label_step(name: str, image: Volume, mask: Volume) -> Step:
    return Step(mask.path, f"labelsTr/{name}.nii.gz", partial(_write_label, image.path))


def _write_label(image_path: Path, source: Path, target: Path) -> None:
    """0 and 1 on the image's own grid; a mask of another size cannot be put there."""
    image, mask = read_volume(image_path), read_volume(source)
    if image.GetSize() != mask.GetSize():
        raise OneShotError(
            f"expected {source} to have the size of {image_path.name}, {image.GetSize()}, found {mask.GetSize()}; "
            "resample it or take it away"
        )
    sitk.WriteImage(label_like(image, (sitk.GetArrayFromImage(mask) > 0).astype(np.uint8)), str(target), True)
