"""One dataset under review: what the server hands out, and where it puts what comes back."""

from __future__ import annotations

import io
import secrets
import threading
from collections import OrderedDict
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from nnunet_oneshot.dataset import Case, RawDataset
from nnunet_oneshot.quality_gate import low_estimate
from nnunet_oneshot.report_pictures import DIVERGENCE_COLOR, Overlay, class_color, contact_sheet, shown_divergence
from nnunet_oneshot.review.carry import Carrier, Correction
from nnunet_oneshot.review.corrections import PICTURES, check_in, check_out, forget, read_label, size_limit
from nnunet_oneshot.review.decisions import Action, UnknownCaseError, correct, decide
from nnunet_oneshot.review.volumes import image_nifti, label_nifti
from nnunet_oneshot.store import DIVERGENCE_MEANING, STATUS_MEANING, CaseRecord, Store, is_by_model_alone
from nnunet_oneshot.training_data import ignore_value
from sam2_propagation.interface import Image, LabelVolume

OFFERS = 8
"""Carried labels that are remembered, so that a next correction is told from them."""
PLANES = ("z", "y", "x")


@dataclass(frozen=True, eq=False)
class Offer:
    """A carried label that a browser was given: what further corrections start from."""

    label: LabelVolume
    correction: Correction


@dataclass(frozen=True)
class CarriedLabel:
    """What a browser is sent of a carried correction.

    Attributes:
        offer: to name it by in the next correction.
        text: what was carried, for people.
        nifti: the label as .nii.gz.
    """

    offer: str
    text: str
    nifti: bytes


class Desk:
    """One dataset under review. Methods may be called from several threads."""

    def __init__(self, raw: RawDataset, store: Store, carrier: Carrier) -> None:
        self.raw, self.store = raw, store
        self._carrier = carrier
        self._names = {case.name for case in raw.cases}
        self._offers: OrderedDict[str, Offer] = OrderedDict()
        self._lock = threading.Lock()
        # A person looks at one case at a time; two tabs at two.
        self._image = lru_cache(maxsize=2)(self._read_image)

    def overview(self) -> dict[str, Any]:
        """What the list shows: the dataset and its cases, the ones that most need a look first."""
        manifest = self.store.read_manifest()
        return {
            "name": self.store.folder.name,
            "round": manifest.round,
            "channels": list(self.raw.json["channel_names"].values()),
            "flat": self.raw.file_ending in PICTURES,
            "classes": [
                {"value": v, "name": n, "color": class_color(v)} for v, n in sorted(self.raw.class_names.items())
            ],
            "divergence_color": DIVERGENCE_COLOR,
            "divergence_meaning": DIVERGENCE_MEANING,
            "statuses": STATUS_MEANING,
            "cases": [self._listed(name, manifest.cases[name]) for name in worst_first(manifest.cases)],
        }

    def volume(self, name: str, kind: str, channel: int = 0) -> bytes:
        """`image`, `label` (the best guess) or `divergence` (1 where a part is the ignore label) as .nii.gz."""
        case, image = self._case(name), self._image(name)
        if kind == "image":
            return image_nifti(image, min(channel, image.data.shape[0] - 1))
        if kind == "label":
            return label_nifti(self.raw.read_label(self.store.fused_path(case.name)), image)
        return label_nifti(self._ignored(name).astype(np.int16), image)

    def sheet(self, name: str) -> bytes:
        """A contact sheet as JPEG, for browsers that cannot show volumes."""
        label, image = self.raw.read_label(self.store.fused_path(self._case(name).name)), self._image(name)
        overlay = Overlay(image, label, self._ignored(name), self.raw.file_ending not in PICTURES)
        buffer = io.BytesIO()
        contact_sheet(overlay).save(buffer, "JPEG", quality=85)
        return buffer.getvalue()

    def decide(self, name: str, action: Action, comment: str | None, seen: str | None) -> dict[str, Any]:
        """See `decisions.decide`; returns the case as the list shows it."""
        return self._listed(name, decide(self.raw, self.store, self._case(name).name, action, comment, seen))

    def correct(self, name: str, content: bytes, file_name: str, seen: str | None) -> dict[str, Any]:
        """Take a corrected label out of a file's content; returns the case as the list shows it."""
        label = read_label(self.raw, self.store, self._case(name), content, file_name)
        return self._corrected(name, label, seen)

    def check_out(self, name: str) -> dict[str, Any]:
        """Write the case's files for other programs; their paths."""
        done = check_out(self.raw, self.store, self._case(name))
        return {
            "images": [str(path) for path in done.images],
            "label": str(done.label),
            "segmentation": None if done.segmentation is None else str(done.segmentation),
            "names": str(done.names),
            "command": done.command,
        }

    def check_in(self, name: str, seen: str | None) -> dict[str, Any]:
        """Take back what another program saved; returns the case as the list shows it."""
        case = self._case(name)
        listed = self._corrected(name, check_in(self.raw, self.store, case), seen)
        forget(self.store, case)
        return listed

    def carry(self, name: str, content: bytes, offer: str | None, reach: int | None) -> CarriedLabel:
        """Carry the slices that differ from the last offer (or from the label in force) through the volume."""
        case = self._case(name)
        edited = read_label(self.raw, self.store, case, content, "edited.nii")
        with self._lock:
            last = self._offers.get(f"{name}/{offer}")
        before = self.raw.read_label(self.store.fused_path(name)) if last is None else last.label
        image = self._image(name)
        done = self._carrier.carry(image, before, edited, None if last is None else last.correction, reach)
        number = self._remember(name, Offer(done.label, done.correction))
        names = [self.raw.class_names[value] for value in done.correction.classes]
        where = ", ".join(str(index + 1) for index in done.correction.indices)
        text = f"carried {', '.join(names)} from {PLANES[done.correction.axis]} = {where}"
        return CarriedLabel(number, text, label_nifti(done.label, image))

    def size_limit(self, name: str) -> int:
        """Bytes that no label of that case exceeds."""
        return size_limit(self._image(name))

    def _corrected(self, name: str, label: LabelVolume, seen: str | None) -> dict[str, Any]:
        return self._listed(name, correct(self.raw, self.store, name, label, seen=seen))

    def _listed(self, name: str, record: CaseRecord) -> dict[str, Any]:
        reasons = [text for text in (record.reason, low_estimate(record, self.raw.class_names)) if text]
        return {
            "name": name,
            "status": record.status,
            "round": record.round,
            "score": score_of(record),
            "estimated": bool(record.quality),
            "divergence": record.divergence,
            "reason": "; ".join(reasons) or None,
            "review": record.review,
        }

    def _remember(self, name: str, offer: Offer) -> str:
        number = secrets.token_hex(8)
        with self._lock:
            self._offers[f"{name}/{number}"] = offer
            while len(self._offers) > OFFERS:
                self._offers.popitem(last=False)
        return number

    def _ignored(self, name: str) -> Any:
        return shown_divergence(
            self.raw.read_label(self.store.label_path(self._case(name).name)), ignore_value(self.raw)
        )

    def _case(self, name: str) -> Case:
        # Names come from outside: only those of the dataset ever become part of a path.
        if name not in self._names:
            raise UnknownCaseError(f"expected a case of {self.store.folder.name}, found another name; reload the page")
        return self.raw.case(name)

    def _read_image(self, name: str) -> Image:
        return self.raw.read_image(self._case(name))


def worst_first(cases: dict[str, CaseRecord]) -> list[str]:
    """Names in the order of need: no label, then by score from the lowest, then what a person drew."""

    def key(name: str) -> tuple[int, float, str]:
        record = cases[name]
        if record.status == "failed" or is_by_model_alone(record):
            return 0, 0.0, name
        score = score_of(record)
        return (1, score, name) if score is not None else (2, 0.0, name)

    return sorted(cases, key=key)


def score_of(record: CaseRecord) -> float | None:
    """Estimated Dice, else the share of consensus; None for labels that are not a machine's, or of a model alone.

    A model that alone labelled a case agrees with itself, rightly or not.
    """
    if record.status in ("annotated", "failed") or is_by_model_alone(record):
        return None
    if record.quality:
        return record.quality["mean"]
    return None if record.divergence is None else 1 - record.divergence
