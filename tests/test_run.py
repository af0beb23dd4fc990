"""`run` on what is there already: a repeat goes on, other wishes are not passed over; -ref is looked at first."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Answer
from fake_propagator import FakePropagator
from raw_datasets import Roots, image_array, label_array, write_image, write_raw

from nnunet_oneshot import cli
from nnunet_oneshot import run as module
from nnunet_oneshot.output import find_output
from nnunet_oneshot.refine import Refinement
from nnunet_oneshot.refine_record import make_plan

Call = Callable[..., Answer]
RUN = ("-d", 501, "-o", 601, "-c", "3d_fullres", "-preset", "tiny", "-np", 1, "-device", "cpu")
FAKE = (*RUN, "-propagator", "fake")


class Trained(Exception):
    """Refinement was reached."""


@pytest.fixture(autouse=True)
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def refine(*_: object, **__: object) -> None:
        raise Trained

    monkeypatch.setattr(module, "refine", refine)


def trains(call: Call, *arguments: object) -> None:
    with pytest.raises(Trained):
        call(cli.run, *arguments)


def refused(answer: Answer, *words: str) -> None:
    assert answer.code == 2, answer
    for word in words:
        assert word in answer.error


def pairs(tmp_path: Path, **content: str) -> Path:
    path = tmp_path / "patients.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def test_the_same_again_goes_on_to_training(toy: Path, fakes: dict[str, FakePropagator], call: Call) -> None:
    trains(call, *FAKE)
    labels = find_output(501, 601).label_path("case_1").stat()
    trains(call, *FAKE)
    assert fakes["fake"].asked == ["case_1", "case_2"], "labelled once"
    assert find_output(501, 601).label_path("case_1").stat() == labels


def test_labels_drawn_since_are_refines_to_take_up(toy: Path, fakes: dict[str, FakePropagator], call: Call) -> None:
    trains(call, *FAKE)
    write_image(toy / "labelsTr/case_0.nii.gz", np.roll(label_array(0), 1, axis=1))
    write_image(toy / "labelsTr/case_1.nii.gz", label_array(1))
    trains(call, *FAKE)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((*RUN, "-propagator", "fake", "twin"), ("twin",)),
        ((*FAKE, "-views", "still", "spare"), ("spare", "shifted")),
        ((*RUN, "-propagator", "sam2", "-adapt", "150"), ("adapt 150", '"sam2"')),
    ],
)
def test_other_wishes_are_not_passed_over(
    toy: Path, roots: Roots, fakes: dict[str, FakePropagator], call: Call, arguments: tuple, words: tuple[str, ...]
) -> None:
    trains(call, *FAKE)
    before = roots.snapshot()
    refused(call(cli.run, *arguments), *words, "--overwrite", "nnUNetv2_oneshot_refine")
    assert roots.snapshot() == before
    trains(call, *arguments, "--overwrite")


def test_the_pairs_of_patients_count_too(
    toy: Path, fakes: dict[str, FakePropagator], call: Call, tmp_path: Path
) -> None:
    trains(call, *FAKE, "-same_patient", pairs(tmp_path, case_1="case_0"))
    refused(call(cli.run, *FAKE), "same_patient none instead of")
    refused(call(cli.run, *FAKE, "-same_patient", pairs(tmp_path, case_2="case_0")), "same_patient")
    again = (*FAKE, "-same_patient", pairs(tmp_path, case_1="case_0"))
    trains(call, *again)
    write_image(toy / "labelsTr/case_1.nii.gz", label_array(1))
    trains(call, *again)


@pytest.mark.parametrize("made", [False, True])
def test_true_labels_are_looked_for_before_anything_is_done(
    toy: Path, roots: Roots, fakes: dict[str, FakePropagator], call: Call, tmp_path: Path, made: bool
) -> None:
    truth = tmp_path / "truth"
    if made:
        # The annotated case's own label scores nothing.
        write_image(truth / "case_0.nii.gz", label_array(0))
    before = roots.snapshot()
    refused(call(cli.run, *FAKE, "-ref", truth), str(truth), "expected true labels", "check -ref")
    assert roots.snapshot() == before
    write_image(truth / "case_2.nii.gz", label_array(2))
    trains(call, *FAKE, "-ref", truth)


# --- what changes during training ---------------------------------------------------------------------------------


def trained_while(monkeypatch: pytest.MonkeyPatch, change: Callable[[], object]) -> None:
    """Refinement ends well, and people change the source dataset meanwhile."""

    def refine(*_: object, **__: object) -> Refinement:
        change()
        return Refinement(make_plan("3d_fullres", preset="tiny"), Path("Dataset601_toy_oneshot/trained"))

    monkeypatch.setattr(module, "refine", refine)


@pytest.fixture
def truth(tmp_path: Path) -> Path:
    """True labels of one case of the dataset, and of one that may be added."""
    folder = tmp_path / "truth"
    for index in (2, 3):
        write_image(folder / f"case_{index}.nii.gz", label_array(index))
    return folder


def test_an_image_added_during_training_costs_no_summary_and_no_scores(
    toy: Path, fakes: dict[str, FakePropagator], call: Call, truth: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained_while(monkeypatch, lambda: write_image(toy / "imagesTr" / "case_3_0000.nii.gz", image_array(3)))
    answer = call(cli.run, *FAKE, "-ref", truth, "-json")
    assert answer.code == 0, answer.err
    said = json.loads(answer.out)
    assert said["labels"]["cases"] == {"annotated": 1, "pseudo": 2}
    assert list(said["scores"]["cases"]) == ["case_2"], "the added image has no label to score"


def test_a_label_drawn_during_training_costs_no_summary(
    toy: Path, fakes: dict[str, FakePropagator], call: Call, truth: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained_while(monkeypatch, lambda: write_image(toy / "labelsTr" / "case_2.nii.gz", label_array(2)))
    answer = call(cli.run, *FAKE, "-ref", truth)
    assert answer.code == 0, answer.err
    assert "no scores: every case with a true label was annotated since" in answer.out


# --- training is looked at before labels are made -----------------------------------------------------------------


def refused_unlabelled(roots: Roots, answer: Answer, *words: str) -> None:
    refused(answer, *words)
    assert not list(roots.raw.glob("Dataset601*"))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("-c", "3d_full"), ("2d, 3d_fullres, 3d_lowres", "found 3d_full;")),
        (("-tr", "OneShotTrainor"), ("found none called 'OneShotTrainor'", "correct -tr")),
        (("-tr", "nnUNetPredictor"), ("found none called 'nnUNetPredictor'",)),
        (("-self_opinion", "builtout"), ("found 'builtout'",)),
        (
            ("-p", "nnUNetResEncUNetMPlans"),
            (
                "'nnUNetResEncUNetMPlans' of Dataset601_toy_oneshot",
                "nnUNetv2_oneshot_propagate -d 501 -o 601",
                "nnUNetv2_plan_and_preprocess -d 601",
                "nnUNetv2_oneshot_refine -d 601 -c 3d_fullres -p nnUNetResEncUNetMPlans",
            ),
        ),
    ],
)
def test_what_cannot_train_is_said_before_labelling(
    toy: Path, roots: Roots, fakes: dict[str, FakePropagator], call: Call, more: tuple[str, str], words: tuple[str, ...]
) -> None:
    refused_unlabelled(roots, call(cli.run, *FAKE, *more), *words)


def test_a_device_that_is_not_there_is_said_before_labelling(
    toy: Path, roots: Roots, fakes: dict[str, FakePropagator], call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused_unlabelled(roots, call(cli.run, *FAKE, "-device", "cuda"), "for 'cuda', found none; use -device cpu")


def test_pictures_have_no_third_dimension_to_train_in(
    roots: Roots, fakes: dict[str, FakePropagator], call: Call
) -> None:
    write_raw(roots.raw, ending=".png")
    refused_unlabelled(roots, call(cli.run, *FAKE), "found images of one slice alone", "use -c 2d")
    trains(call, *FAKE, "-c", "2d")


def test_plans_that_are_there_may_have_configurations_of_their_own(
    toy: Path, roots: Roots, fakes: dict[str, FakePropagator], call: Call
) -> None:
    own = (*FAKE, "-p", "Own", "-c", "3d_mine")
    plans = roots.preprocessed / "Dataset601_toy_oneshot" / "Own.json"
    plans.parent.mkdir()
    plans.write_text(json.dumps({"configurations": {"3d_mine": {}}}), encoding="utf-8")
    refused_unlabelled(roots, call(cli.run, *own, "-c", "3d_yours"), "found 3d_mine")
    trains(call, *own)
    refused(call(cli.run, *own, "--overwrite"), "expected plans 'Own'", "labels are not made yet")
    assert plans.is_file(), "nothing was replaced"


def test_models_in_the_way_of_new_labels_are_said_before_these_are_made(
    toy: Path, roots: Roots, fakes: dict[str, FakePropagator], call: Call
) -> None:
    trains(call, *FAKE)
    name = "OneShotTrainer_tiny__nnUNetOneShotSmallPlans__3d_fullres"
    (roots.results / "Dataset601_toy_oneshot" / name / "fold_all").mkdir(parents=True)
    before = roots.snapshot()
    refused(call(cli.run, *FAKE, "--overwrite"), "fold_all", "by --overwrite", "move them out of nnUNet_results")
    assert roots.snapshot() == before


@pytest.mark.parametrize("command", [cli.run, cli.propagate, cli.consensus])
def test_help_of_overwrite_tells_what_to_do_with_models(call: Call, command: Callable) -> None:
    assert "move its models out of nnUNet_results first" in " ".join(call(command, "-h").out.split())
