"""Decisions: what they do to labels, manifest and training files, and that a refinement obeys them."""

from __future__ import annotations

import json
import multiprocessing
from datetime import datetime, timedelta, timezone
from pathlib import Path

import numpy as np
import pytest
from raw_datasets import Roots, geometry, label_array, make_sparse, read, write_image, write_raw
from review_dataset import block, make_reviewed, record

from nnunet_oneshot.consensus import consensus
from nnunet_oneshot.dataset import open_dataset
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.relabel import cases_to_predict, relabel
from nnunet_oneshot.review.decisions import ConflictError, correct, decide
from nnunet_oneshot.store import Store, read_manifest

IGNORE = 3


class Reviewed:
    """Dataset 601 with short names for what the tests ask."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.raw, self.store = folder, open_dataset(501), Store(folder, ".nii.gz")

    def decide(self, case: str, action: str, **more: str | None) -> None:
        more.setdefault("seen", (record(self.folder, case)["review"] or {}).get("time"))
        decide(self.raw, self.store, case, action, **more)  # type: ignore[arg-type]

    def target(self, case: str) -> np.ndarray:
        return read(self.store.label_path(case))

    def fused(self, case: str) -> np.ndarray:
        return read(self.store.fused_path(case))


@pytest.fixture
def reviewed(roots: Roots, tmp_path: Path) -> Reviewed:
    return Reviewed(make_reviewed(roots, tmp_path))


def test_accepted_label_is_trained_on_everywhere(reviewed: Reviewed, roots: Roots) -> None:
    assert (reviewed.target("case_3") == IGNORE).any()
    begin = datetime.now(timezone.utc)
    reviewed.decide("case_3", "accept", comment="looks right")
    assert (reviewed.target("case_3") == reviewed.fused("case_3")).all()
    found = record(reviewed.folder, "case_3")
    assert found["status"] == "accepted"
    assert found["review"]["decision"] == "accepted"
    assert found["review"]["comment"] == "looks right"
    assert timedelta(0) <= datetime.fromisoformat(found["review"]["time"]) - begin < timedelta(minutes=1)
    assert "case_3" not in block(reviewed.folder)["left_out"]
    copy = roots.preprocessed / reviewed.folder.name / "dataset.json"
    assert json.loads(copy.read_text())["oneshot"] == block(reviewed.folder), "what nnU-Net's trainer reads"


def test_rejected_case_is_left_out_and_can_come_back(reviewed: Reviewed) -> None:
    before, guess = reviewed.target("case_2"), reviewed.fused("case_2")
    where = geometry(reviewed.store.label_path("case_2"))
    reviewed.decide("case_2", "reject")
    assert (reviewed.target("case_2") == IGNORE).all()
    assert block(reviewed.folder)["left_out"] == ["case_2"]
    assert geometry(reviewed.store.label_path("case_2")) == where
    reviewed.decide("case_2", "undo")
    assert (reviewed.target("case_2") == before).all()
    assert (reviewed.fused("case_2") == guess).all()
    found = record(reviewed.folder, "case_2")
    assert (found["status"], found["review"]["decision"]) == ("pseudo", None)
    assert block(reviewed.folder)["left_out"] == []
    with pytest.raises(OneShotError, match="expected a decision to undo"):
        reviewed.decide("case_2", "undo")


def test_corrected_label_makes_the_case_annotated(reviewed: Reviewed) -> None:
    drawn = np.zeros_like(label_array(2)).astype(np.int16)
    drawn[1:3, 3:6, 3:6] = 2
    machine = reviewed.fused("case_2")
    correct(reviewed.raw, reviewed.store, "case_2", drawn)
    assert block(reviewed.folder)["annotated"] == ["case_0", "case_2"]
    for path in (reviewed.store.label_path("case_2"), reviewed.store.round_path(0, "case_2")):
        assert (read(path) == drawn).all()
    reviewed.decide("case_2", "accept")
    assert record(reviewed.folder, "case_2")["status"] == "corrected", "accepting what was drawn changes nothing"
    reviewed.decide("case_2", "undo")
    assert (reviewed.fused("case_2") == machine).all()
    with pytest.raises(OneShotError, match="expected foreground"):
        correct(reviewed.raw, reviewed.store, "case_2", 0 * drawn)


def test_a_round_obeys_decisions(reviewed: Reviewed, tmp_path: Path) -> None:
    drawn = np.roll(label_array(1), 2, axis=1).astype(np.int16)
    correct(reviewed.raw, reviewed.store, "case_1", drawn)
    reviewed.decide("case_2", "reject")
    reviewed.decide("case_3", "accept")
    accepted = reviewed.fused("case_3")
    manifest = read_manifest(reviewed.store.manifest_path)
    assert [c.name for c in cases_to_predict(reviewed.raw, manifest)] == ["case_2"]
    write_image(tmp_path / "predicted" / "case_2.nii.gz", label_array(0))
    relabel(reviewed.raw, reviewed.store, tmp_path / "predicted", 1, 1)
    assert (reviewed.target("case_1") == drawn).all()
    assert (reviewed.target("case_3") == accepted).all()
    assert (reviewed.target("case_2") == IGNORE).all()
    assert block(reviewed.folder) == {
        "schema": 1,
        "round": 1,
        "annotated": ["case_0", "case_1"],
        "left_out": ["case_2"],
        "case_weight": {},
    }
    reviewed.decide("case_2", "undo")
    begins = read(reviewed.store.round_path(1, "case_2"))
    assert (begins == reviewed.fused("case_2")).all(), "what the next round begins with"


def test_flag_and_comment_change_no_label(reviewed: Reviewed) -> None:
    before = reviewed.target("case_1")
    reviewed.decide("case_1", "flag", comment="odd shape")
    reviewed.decide("case_1", "comment", comment="odd shape at the top")
    review = record(reviewed.folder, "case_1")["review"]
    assert (review["flag"], review["comment"], review["decision"]) == (True, "odd shape at the top", None)
    assert record(reviewed.folder, "case_1")["status"] == "pseudo"
    reviewed.decide("case_1", "unflag")
    review = record(reviewed.folder, "case_1")["review"]
    assert (review["flag"], review["comment"]) == (False, "odd shape at the top")
    assert (reviewed.target("case_1") == before).all()


def test_what_a_person_drew_is_not_up_for_decision(reviewed: Reviewed, toy: Path) -> None:
    for action in ("accept", "reject"):
        with pytest.raises(OneShotError, match="found one drawn by a person"):
            reviewed.decide("case_0", action)
    with pytest.raises(OneShotError, match="found one drawn by a person"):
        correct(reviewed.raw, reviewed.store, "case_0", label_array(0).astype(np.int16))
    reviewed.decide("case_0", "flag")
    assert record(reviewed.folder, "case_0")["status"] == "annotated"


def test_two_people_at_once(reviewed: Reviewed) -> None:
    reviewed.decide("case_1", "accept", seen=None)
    with pytest.raises(ConflictError, match="look at it again"):
        reviewed.decide("case_1", "reject", seen=None)
    assert record(reviewed.folder, "case_1")["status"] == "accepted"


def test_unknown_case(reviewed: Reviewed) -> None:
    with pytest.raises(OneShotError, match="expected a case of the dataset"):
        decide(reviewed.raw, reviewed.store, "../../etc/passwd", "accept")


def test_no_decision_while_a_refinement_is_at_work(reviewed: Reviewed) -> None:
    with reviewed.store.lock("refine"), pytest.raises(OneShotError, match="refine"):
        reviewed.decide("case_1", "accept")
    assert record(reviewed.folder, "case_1")["status"] == "pseudo"


def test_a_case_without_a_label(roots: Roots, tmp_path: Path) -> None:
    reviewed = Reviewed(make_reviewed(roots, tmp_path, failed=True))
    assert record(reviewed.folder, "case_3")["status"] == "failed"
    with pytest.raises(OneShotError, match="expected a label to accept"):
        reviewed.decide("case_3", "accept")
    correct(reviewed.raw, reviewed.store, "case_3", label_array(1).astype(np.int16))
    assert block(reviewed.folder)["left_out"] == []
    assert block(reviewed.folder)["annotated"] == ["case_0", "case_3"]


def test_drawn_voxels_of_a_sparse_annotation_stay(roots: Roots, tmp_path: Path) -> None:
    folder = write_raw(roots.raw)
    drawn = make_sparse(folder)
    for index in range(3):
        write_image(tmp_path / "tool" / f"case_{index}.nii.gz", label_array(index))
    consensus(501, 601, [tmp_path / "tool"], num_processes=1)
    reviewed = Reviewed(roots.raw / "Dataset601_toy_oneshot")
    assert record(reviewed.folder, "case_0")["status"] == "sparse"
    with pytest.raises(OneShotError, match="annotated slices"):
        reviewed.decide("case_0", "reject")
    correct(reviewed.raw, reviewed.store, "case_0", np.ones_like(drawn, dtype=np.int16))
    result = reviewed.target("case_0")
    assert (result[drawn != IGNORE] == drawn[drawn != IGNORE]).all()
    assert (result[drawn == IGNORE] == 1).all()


def _accept(folder: Path, cases: list[str]) -> None:
    reviewed = Reviewed(folder)
    for case in cases:
        reviewed.decide(case, "accept")


@pytest.mark.slow
def test_processes_at_once_lose_no_decision(reviewed: Reviewed) -> None:
    context = multiprocessing.get_context("spawn")
    others = [context.Process(target=_accept, args=(reviewed.folder, [case])) for case in ("case_1", "case_2")]
    for other in others:
        other.start()
    for other in others:
        other.join(120)
    assert [other.exitcode for other in others] == [0, 0]
    assert {record(reviewed.folder, case)["status"] for case in ("case_1", "case_2")} == {"accepted"}


def test_a_crash_before_the_manifest_leaves_the_old_decision(
    reviewed: Reviewed, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = reviewed.store.manifest_path.read_bytes()
    with monkeypatch.context() as broken:
        broken.setattr(Store, "write_manifest", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            reviewed.decide("case_3", "accept")
    assert reviewed.store.manifest_path.read_bytes() == before
    reviewed.decide("case_3", "accept")
    reviewed.decide("case_3", "undo")
    assert (reviewed.target("case_3") == IGNORE).any(), "the machine's label was put aside before anything changed"
