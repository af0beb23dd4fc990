"""The tables of results: what is compared with what. The rows here are made up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture(scope="module")
def table(benchmark_module: Callable[[str], Any]) -> Any:
    return benchmark_module("evidence_table")


def row(method: str, dice: float, *, annotated: str = "case_1", **more: Any) -> dict[str, Any]:
    cases = {f"test_{i}": dice + 0.01 * i for i in range(-2, 3)}
    scores = {
        name: {m: [dice, dice - 0.01, dice + 0.01] for m in ("Dice", "HD95", "ASSD")} for name in ("foreground", "a")
    }
    made = {"set": "toy", "annotated": annotated, "method": method, "pool": 9, "test_cases": 5}
    made |= {
        "preset": "small",
        "scores": scores,
        "dice_per_case": cases,
        "minutes": {"labelling": 1.0, "training": 2.0},
    }
    made |= {"hardware": "A chip, 2 cores", "versions": {"torch": "1"}, "commit": "abc"}
    return {**made, **more}


def test_the_pages_hold_what_the_rows_say(table: Any) -> None:
    """A row that came without `evidence.py --table` would leave them behind."""
    rows = table.read_rows()
    own = [row for row in rows if not table.variant(row)]
    assert table.page(["hippocampus", "chaos_mr_t2", "acdc_mr", "hc18_us"], rows) in table.PAGE.read_text("utf-8")
    assert "\n".join(table.headline(own)) in table.README.read_text("utf-8")


def test_paired_differences_are_over_the_cases_of_both(table: Any) -> None:
    first, second = row("ours", 0.8), row("full", 0.9)
    second["dice_per_case"]["another"] = 0.1
    assert table.paired(first, second) == pytest.approx((-0.1, -0.1, -0.1))


def test_the_headline_holds_ours_against_rivals_of_the_same_annotation(table: Any) -> None:
    """Parts of ours are no rivals, and who saw a slice of every volume is named apart."""
    rows = [row("full", 0.9), row("registration_stock", 0.7), row("oneseg_slices", 0.85), row("ours", 0.8)]
    worse = [row("sam2_stock", 0.65), row("oneseg", 0.6)]
    assert (
        "against the best of 3 others from the same annotation, registration, t" in table.headline([*rows, *worse])[2]
    )
    rows += [row("ours_no_refinement", 0.82), row("stock_with_ignore", 0.84)]
    mean, _, line, _ = table.headline(rows)
    assert "-10.0 points of test Dice against full supervision" in mean
    assert (
        "+10.0 points (+10.0 to +10.0) against the one other that was run from the same annotation, registration, then"
        in line
    )
    assert (
        "-5.0 points (-5.0 to -5.0) against the one other that was run from one slice of every volume, OneSeg" in line
    )


def test_the_headline_averages_over_annotated_cases_and_never_mixes_them(table: Any) -> None:
    rows = [row("full", 0.9), row("ours", 0.8)]
    rows += [row("full", 0.6, annotated="case_2"), row("ours", 0.56, annotated="case_2")]
    lines = table.headline(rows)
    assert "-7.0 points" in lines[0]
    assert [line.split(":")[0] for line in lines[2:4]] == ["- toy, case_1", "- toy, case_2"]


def test_without_ours_or_full_supervision_there_is_no_headline(table: Any) -> None:
    assert "no set" in table.headline([row("ours", 0.8), row("registration_stock", 0.7)])[0]


def test_repetitions_are_rows_of_their_own_and_their_spread_is_told(table: Any) -> None:
    rows = [row("ours", 0.80), row("ours", 0.84, training=2), row("full", 0.9)]
    assert "| ours, repetition 2 |" in table.scores_table(rows)
    spread = table.spread_table(rows)
    assert "| ours | 2 | 0.820 | 0.028 |" in spread
    assert "full" not in spread
    assert table.spread_table(rows[1:]) == ""


@pytest.mark.parametrize(
    ("variant", "title"),
    [
        ("3d_fullres", "3d_fullres"),
        ("no_mirroring", "no mirrored images"),
        ("2d, no_mirroring", "2d, no mirrored images"),
    ],
)
def test_variants_have_tables_of_their_own_and_no_say_in_the_headline(table: Any, variant: str, title: str) -> None:
    rows = [row("full", 0.9), row("ours", 0.8), row("full", 0.3, variant=variant)]
    rows.append(row("ours", 0.4, variant=variant))
    page = table.page(["toy"], rows)
    assert "1 data set(s): -10.0 points of test Dice" in page
    own, other = page.split(f"### toy: {title}\n")
    assert "| 0.300 |" in other
    assert "- toy, case_1: +10.0 points" in other
    assert "| 0.300 |" not in own
    assert "+0.100 (+0.100 to +0.100)" in other


def test_full_supervision_trained_once_more_is_annotated_like_it_and_no_part_of_ours(table: Any) -> None:
    rows = [row("full", 0.9), row("full_again", 0.92), row("ours", 0.8)]
    assert table.scores_table(rows).count("| every case |") == 2
    assert table._color("full_again") == table._color("full") != table._color("ours_no_sam2")
    assert "-10.0 points of test Dice against full supervision" in table.headline(rows)[0]


def test_the_headline_tells_of_full_supervision_that_is_trained_as_often_too_where_it_was(table: Any) -> None:
    once = [row("full", 0.9), row("ours", 0.8)]
    mean, _, line, _ = table.headline([*once, row("full_again", 0.92)])
    assert "it is not known, with two each -12.0." in mean
    assert "-12.0 points (-12.0 to -12.0) against the same trained once more" in line
    assert "with two each not known" in table.headline(once)[0]
    unlike = [*once, row("ours_no_refinement", 0.7), row("full", 0.5, set="b"), row("ours", 0.5, set="b")]
    assert "(ours without its round) it is -20.0 (1 of 2 annotated cases), with" in table.headline(unlike)[0]


def test_images_of_a_patient_are_drawn_together(table: Any) -> None:
    """Two phases of a heart are not two hearts: of three patients an interval is as wide as of three images."""
    three = {"a_frame01": 0.0, "b_frame01": 0.5, "c_frame01": 1.0}
    six = {**three, **{case.replace("01", "12"): value for case, value in three.items()}}
    assert table.interval(six) == pytest.approx(table.interval(three))
    apart = {case.replace("_frame", "_of"): value for case, value in six.items()}
    assert table.interval(apart)[2] < table.interval(six)[2]


def test_rows_of_another_preset_stand_apart(table: Any) -> None:
    rows = [row("full", 0.9), row("ours", 0.8), row("full", 0.95, preset="default")]
    own, other = table.page(["toy"], rows).split("### toy: preset default")
    assert "0.950" in other
    assert "0.950" not in own


def test_where_rows_start_from_unlike_cases_all_tables_say_which(table: Any) -> None:
    rows = [row("ours", 0.8), row("ours", 0.7, annotated="case_2")]
    for made in (table.making_table(rows), table.classes_table(rows)):
        assert "ours, case_1 |" in made
        assert "ours, case_2 |" in made
    assert "case_1" not in table.making_table(rows[:1])


def test_distances_of_images_without_spacing_are_pixels(table: Any) -> None:
    assert "HD95 px" in table.scores_table([row("ours", 0.8, set="hc18_us")])
    assert "HD95 mm" in table.scores_table([row("ours", 0.8)])


def test_every_class_has_its_figures_and_every_row_its_commit(table: Any) -> None:
    rows = [row("ours", 0.8, trainings_of_the_model=2, label_dice={"0": 0.7, "1": 0.75}, divergence=0.02)]
    assert "0.800 (0.790 to 0.810); 0.8 (0.8 to 0.8); 0.80 (0.79 to 0.81)" in table.classes_table(rows)
    made = table.making_table(rows)
    assert "0.700 / 0.750 | 2.0%" in made
    assert "| abc |" in made
    assert "| ours | case_1 | 2 | 0.800 |" in table.scores_table(rows)


def test_the_rows_that_there_are_make_a_page(table: Any) -> None:
    rows = table.read_rows()
    page = table.page(sorted({r["set"] for r in rows}), rows)
    assert all(f"### {name}" in page for name in {r["set"] for r in rows})
    assert all(table.METHODS[r["method"]].what in page for r in rows)


def test_every_row_is_held_against_the_best_that_starts_from_the_same_annotation(table: Any) -> None:
    rows = [row("full", 0.9), row("registration_stock", 0.7), row("sam2_stock", 0.65), row("ours", 0.8)]
    rows += [row("oneseg_slices", 0.85), row("ours_slices", 0.86)]
    cells = {line.split("|")[1].strip(): line.split("|")[8].strip() for line in table.scores_table(rows).split("\n")}
    assert cells["ours"] == "+0.100 (+0.100 to +0.100)"
    assert cells["SAM2 on registration (self mode), then nnU-Net"] == "-0.050 (-0.050 to -0.050)"
    assert cells["registration, then nnU-Net"] == "-"
    assert cells["nnU-Net, fully supervised on the pool"] == "-"
    assert cells["ours, from one slice a volume"] == "+0.010 (+0.010 to +0.010)"


def test_the_best_other_is_met_by_ours_with_as_many_trainings_too(table: Any) -> None:
    """Two trainings beat one, whatever the labels."""
    rows = [row("full", 0.9), row("sam2_stock", 0.7, trainings_of_the_model=1), row("ours", 0.8)]
    rows.append(row("ours_no_refinement", 0.71))
    said = "+10.0 points (+10.0 to +10.0) against the one other that was run from the same annotation, SAM2 on"
    line = table.headline(rows)[2]
    assert said in line
    assert "(+1.0 points (+1.0 to +1.0) where ours is trained once, as that is)" in line
    often = [row("full", 0.9), row("sam2_stock_again", 0.7, trainings_of_the_model=2), *rows[2:]]
    assert "where ours is trained once" not in table.headline(often)[2]


def test_two_annotated_cases_are_no_part_of_the_headline_of_one(table: Any) -> None:
    rows = [row("full", 0.9), row("ours", 0.8)]
    rows += [row("full", 0.9, annotated="case_1+case_2"), row("ours", 0.88, annotated="case_1+case_2")]
    own, other = table.page(["toy"], rows).split("### toy: 2 annotated cases\n")
    assert "1 data set(s): -10.0 points of test Dice" in own
    assert "case_1+case_2" not in own
    assert "- toy, case_1+case_2: -2.0 points" in other


def test_patients_are_counted_where_they_are_fewer_than_images(table: Any) -> None:
    hearts = row("ours", 0.8, dice_per_case={f"patient00{i % 3}_frame{i:02d}": 0.8 for i in range(6)}, test_cases=6)
    assert "6 test cases of 3 patients, preset small." in table.page(["toy"], [hearts])
    assert "5 test cases, preset small." in table.page(["toy"], [row("ours", 0.8)])


def test_what_is_not_run_is_told_of_every_annotated_case_of_the_protocol(table: Any) -> None:
    rows = [row("full", 0.9, set="hc18_us", annotated="hc18_236")]
    rows.append(row("ours", 0.8, set="hc18_us", annotated="hc18_236", variant="3d_fullres"))
    methods, _, presets, again = table.not_run(["hc18_us"], rows)
    _, _, first, second, third = methods.split("\n")
    assert first.startswith("| hc18_us | hc18_236 | 1 of 30 |")
    assert "; ours; " in first, "a variant does not stand in for it"
    assert "fully supervised on the pool;" not in first
    assert "slice a volume" not in first, "of single images there is none"
    assert [line.split("|")[2:5] for line in (second, third)] == [
        [f" hc18_{number} ", " 0 of 30 ", " anything "] for number in (600, "012")
    ]
    assert "--preset default" in presets
    assert "--training 2" in again
    assert len(table.not_run(["hc18_us"], [*rows, row("full", 0.9, training=2, preset="default")])) == 2


@pytest.mark.real
def test_the_annotated_cases_are_those_of_the_protocol(benchmark_module: Callable[[str], Any], table: Any) -> None:
    data_set = benchmark_module("common").data_set
    for name, choices in table.CHOICES.items():
        split = data_set(name).split
        assert list(choices) == split["annotated_choices"]
        assert choices[0] == split["annotated_default"]
