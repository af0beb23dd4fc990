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
