"""One self-contained HTML page about a pseudo-label dataset: rounds, every case's figures, and pictures.

Everything is read from the store; nothing in the dataset is changed. Pictures are JPEG inside the page: a thumbnail a
case (a few kB) and contact sheets of a few cases, so that the page of 500 cases stays in the low megabytes.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

import numpy as np

from nnunet_oneshot.dataset import Case, RawDataset, find_raw_folder, open_source
from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.evaluate import Evaluation, evaluate
from nnunet_oneshot.metrics import METRICS
from nnunet_oneshot.parallel import default_processes, over_cases
from nnunet_oneshot.quality import dice_by_class, foreground
from nnunet_oneshot.quality_gate import low_estimate, mean_quality
from nnunet_oneshot.report_charts import histogram, line_chart, scatter_chart
from nnunet_oneshot.report_pictures import (
    DIVERGENCE_COLOR,
    Color,
    Overlay,
    class_color,
    contact_sheet,
    data_uri,
    shown_divergence,
    thumbnail,
)
from nnunet_oneshot.rounds import kept_manifest, kept_rounds
from nnunet_oneshot.store import (
    DIVERGENCE_MEANING,
    DRAWN,
    HUMAN_WORD,
    STATUS_MEANING,
    CaseRecord,
    Manifest,
    Store,
    read_manifest,
)
from nnunet_oneshot.training_data import ignore_value
from sam2_propagation.interface import LabelVolume

OUTLIER = 3.5
"""Robust z-score from which a volume is called an outlier (Iglewicz and Hoaglin)."""
ESTIMATE_MEANING = (
    "Estimated Dice is the overlap, from 0 (none) to 1 (all), to be expected with a label that a person would draw; "
    "no such label of these cases was looked at."
)
PLAIN_FORMATS = (".png", ".bmp", ".tif", ".tiff")
"""Formats that hold no direction."""


@dataclass(frozen=True)
class CaseTask:
    """What a worker needs to look at one case; `rounds` are those that relabelled it."""

    dataset: RawDataset
    store: Store
    case: Case
    rounds: tuple[int, ...]
    sheet: bool = False


@dataclass(frozen=True)
class CaseFacts:
    """What the labels of one case tell.

    Attributes:
        volumes: millilitres (pixels for 2D formats) of each label value in the best guess.
        agreement: mean foreground Dice with the label before, by the round that relabelled the case.
        picture: address of the thumbnail, or of the contact sheet where one was asked for.
    """

    case: str
    volumes: dict[int, float]
    agreement: dict[int, float]
    picture: str


@dataclass(frozen=True)
class _Page:
    """All that the page is made of."""

    dataset: RawDataset
    manifest: Manifest
    facts: dict[str, CaseFacts]
    scores: Evaluation | None
    estimates: dict[int, float]
    """Mean estimated Dice of each round's labels, where it is known."""

    def quality(self, case: str) -> float | None:
        """Estimated Dice; without an estimate the share of consensus stands in for it."""
        record = self.manifest.cases[case]
        if record.quality:
            return record.quality["mean"]
        return None if record.divergence is None else 1 - record.divergence

    @property
    def ranked(self) -> list[str]:
        """Cases that a machine labelled and that training uses, worst first."""
        values = {c: self.quality(c) for c, r in self.manifest.cases.items() if r.status in ("pseudo", "accepted")}
        return sorted((c for c, v in values.items() if v is not None), key=lambda c: (values[c] or 0.0, c))


def report(
    dataset: int | str,
    output: Path | None = None,
    *,
    truth: Path | None = None,
    sheets: int = 2,
    num_processes: int | None = None,
) -> Path:
    """Write the page.

    Args:
        dataset: id or name of a dataset that `propagate` or `consensus` made.
        output: HTML file; `report.html` in the dataset's folder when None. An earlier one is replaced.
        truth: folder of true labels, to show true beside estimated quality; never used for anything else.
        sheets: how many of the best, of the median and of the worst cases get a contact sheet.
        num_processes: cases read at once; the processor count when None.

    Returns:
        The page's path.

    Raises:
        OneShotError: there is no manifest, a file is missing or unreadable, or the page cannot be written.
    """
    folder = find_raw_folder(dataset)
    manifest = read_manifest(folder / "oneshot.json")
    raw = open_source(manifest.source_dataset, folder)
    store = Store(folder, raw.file_ending)
    output = Path(output) if output is not None else folder / "report.html"
    processes = num_processes or default_processes()
    # What may be refused comes before minutes of looking at images.
    _check_folder(output)
    # Images added since have no label before refine takes them up.
    known = [case for case in raw.cases if case.name in manifest.cases]
    scores = _scores(raw, store, manifest, truth)
    facts = _look(raw, store, known, processes, "report")
    page = _Page(raw, manifest, facts, scores, _estimates(store, manifest))
    chosen = _chosen(page.ranked, sheets)
    large = _look(raw, store, [raw.case(c) for _, c in chosen], processes, "pictures", sheet=True)
    _write(output, _render(page, [(rank, c, large[c].picture) for rank, c in chosen]))
    return output


def look_at_case(task: CaseTask) -> CaseFacts:
    """Read a case's labels and draw it."""
    dataset, store, name = task.dataset, task.store, task.case.name
    image = dataset.read_image(task.case)
    guess = _read(dataset, store.fused_path(name))
    target = _read(dataset, store.label_path(name))
    oriented = dataset.file_ending not in PLAIN_FORMATS
    overlay = Overlay(image, guess, shown_divergence(target, ignore_value(dataset)), oriented)
    picture = data_uri(contact_sheet(overlay)) if task.sheet else data_uri(thumbnail(overlay), quality=70)
    counts = np.bincount(guess.ravel(), minlength=max(dataset.label_values) + 1)
    unit = float(np.prod(image.spacing)) / 1000 if oriented else 1.0
    volumes = {v: float(counts[v]) * unit for v in dataset.label_values if v}
    return CaseFacts(name, volumes, _agreement(dataset, store, name, task.rounds), picture)


def volume_outliers(facts: Mapping[str, CaseFacts]) -> dict[str, dict[int, float]]:
    """Robust z-scores (0.6745 times the distance from the median, in median absolute deviations) beyond `OUTLIER`."""
    found: dict[str, dict[int, float]] = {}
    for value in sorted({v for f in facts.values() for v in f.volumes}):
        volumes = np.array([f.volumes[value] for f in facts.values()])
        deviation = float(np.median(np.abs(volumes - np.median(volumes))))
        for case, volume in zip(facts, volumes, strict=True):
            score = 0.6745 * (volume - float(np.median(volumes))) / deviation if deviation else 0.0
            if abs(score) > OUTLIER:
                found.setdefault(case, {})[value] = float(score)
    return found


def _look(
    raw: RawDataset, store: Store, cases: Sequence[Case], processes: int, title: str, sheet: bool = False
) -> dict[str, CaseFacts]:
    relabelled = {} if sheet else _relabelled(store)
    tasks = [
        CaseTask(raw, store, case, tuple(n for n, names in relabelled.items() if case.name in names), sheet)
        for case in cases
    ]
    found = {f.case: f for f in over_cases(look_at_case, tasks, processes=processes, title=title)}
    return dict(sorted(found.items()))


def _relabelled(store: Store) -> dict[int, set[str]]:
    """Cases that each round after propagation made a new label for: all without a person's whole word."""
    rounds = {n: kept_manifest(store, n).cases for n in kept_rounds(store) if n > 0}
    return {n: {name for name, r in cases.items() if r.status not in HUMAN_WORD} for n, cases in rounds.items()}


def _estimates(store: Store, manifest: Manifest) -> dict[int, float]:
    means = {number: mean_quality(kept_manifest(store, number)) for number in kept_rounds(store)}
    means.setdefault(manifest.round, mean_quality(manifest))
    return {number: mean for number, mean in means.items() if mean is not None}


def _read(dataset: RawDataset, path: Path) -> LabelVolume:
    if not path.is_file():
        raise OneShotError(f"expected the label {path}, found none; make the labels again")
    return dataset.read_label(path)


def _agreement(dataset: RawDataset, store: Store, case: str, rounds: Sequence[int]) -> dict[int, float]:
    pairs = {n: (store.round_path(n - 1, case), store.round_path(n, case)) for n in rounds}
    there = {n: pair for n, pair in pairs.items() if all(path.is_file() for path in pair)}
    return {n: _dice(*(dataset.read_label(path) for path in pair)) for n, pair in there.items()}


def _dice(first: LabelVolume, second: LabelVolume) -> float:
    """Mean over the foreground values that are in either; 1 where there are none."""
    dice = dice_by_class(first, second, foreground([first, second]))
    return float(np.mean(list(dice.values()))) if dice else 1.0


def _scores(raw: RawDataset, store: Store, manifest: Manifest, truth: Path | None) -> Evaluation | None:
    """True scores of the un-annotated cases that have a true label."""
    if truth is None:
        return None
    known = {p.name[: -len(raw.file_ending)] for p in Path(truth).glob(f"*{raw.file_ending}")} & set(manifest.cases)
    cases = [c.name for c in raw.unannotated if c.name in known]
    if not cases:
        raise OneShotError(f"expected true labels of un-annotated cases of {raw.name} in {truth}, found none; check it")
    return evaluate(Path(truth), store.fused_path("x").parent, raw.folder / "dataset.json", cases=cases)


def _chosen(ranked: Sequence[str], count: int) -> list[tuple[str, str]]:
    """(rank, case): the best, the median and the worst, each case once."""
    middle = max(0, (len(ranked) - count) // 2)
    groups = {"best": ranked[::-1][:count], "median": ranked[middle : middle + count], "worst": ranked[:count]}
    seen: dict[str, str] = {}
    for rank in ("best", "worst", "median"):
        for case in groups[rank]:
            seen.setdefault(case, rank)
    return [(rank, case) for rank in groups for case in groups[rank] if seen[case] == rank]


def _render(page: _Page, sheets: Sequence[tuple[str, str, str]]) -> str:
    template = Template(files("nnunet_oneshot").joinpath("report.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=escape(f"One-shot labels of {page.dataset.name}"),
        summary=_summary(page),
        statuses=_statuses(page.manifest),
        legend=_legend(page.dataset),
        rounds=_rounds_table(page),
        charts=_charts(page),
        ranking=escape(_ranking(page)),
        sheets="".join(_sheet(page, *entry) for entry in sheets) or "<p>No case has a label to rank.</p>",
        outliers=escape(f"A volume is marked when its robust z-score is beyond {OUTLIER}."),
        cases=_cases_table(page),
        settings=escape(_settings(page.manifest)),
    )


def _summary(page: _Page) -> str:
    counts = Counter(record.status for record in page.manifest.cases.values())
    parts = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
    said = f"{len(page.manifest.cases)} cases: {parts}. Round in force: {page.manifest.round}."
    if added := sum(case.name not in page.manifest.cases for case in page.dataset.cases):
        said += f" Images added since: {added}; nnUNetv2_oneshot_refine takes them up."
    return escape(said)


def _statuses(manifest: Manifest) -> str:
    """What the statuses on the page mean."""
    found = {record.status for record in manifest.cases.values()}
    return "".join(f"<li>{escape(f'{s}: {text}')}</li>" for s, text in STATUS_MEANING.items() if s in found)


def _legend(dataset: RawDataset) -> str:
    names = sorted(dataset.class_names.items())
    keys = [f"{_key(class_color(value))}{escape(name)} (contour)" for value, name in names]
    return "".join([*keys, f"{_key(DIVERGENCE_COLOR)}divergence: {DIVERGENCE_MEANING}"])


def _key(color: Color) -> str:
    return f'<span class="key" style="background: rgb{color}"></span>'


def _rounds_table(page: _Page) -> str:
    rows = []
    for number in sorted({n for f in page.facts.values() for n in f.agreement} | {0} | set(page.estimates)):
        values = [f.agreement[number] for f in page.facts.values() if number in f.agreement]
        figures = (np.mean(values), np.median(values), np.min(values)) if values else ()
        cells = [f"{v:.3f}" for v in figures] or ["", "", ""]
        estimate = f"{page.estimates[number]:.3f}" if number in page.estimates else ""
        made_by = "model" if number else "propagation"
        rows.append([str(number), made_by, estimate, str(len(values) or ""), *cells])
    head = ["round", "labels by", "mean estimated Dice", "relabelled cases"]
    head += ["Dice to the round before: mean", "median", "lowest"]
    return _table(head, [[_cell(c) for c in row] for row in rows])


def _charts(page: _Page) -> str:
    charts = []
    numbers = sorted({n for f in page.facts.values() for n in f.agreement})
    if len(numbers) > 1:
        means = [
            (n, float(np.mean([f.agreement[n] for f in page.facts.values() if n in f.agreement]))) for n in numbers
        ]
        charts.append(line_chart("Mean Dice to the round before", means, "round"))
    if len(page.estimates) > 1:
        charts.append(line_chart("Mean estimated Dice", sorted(page.estimates.items()), "round"))
    qualities = [q for c in page.ranked if (q := page.quality(c)) is not None]
    if qualities:
        charts.append(histogram("Cases by " + _quality_name(page), qualities, _quality_name(page)))
    if page.scores is not None:
        charts.append(_true_against_estimated(page, page.scores))
    return "".join(charts)


def _true_against_estimated(page: _Page, scores: Evaluation) -> str:
    dice = dict(zip(scores.cases, scores.case_mean()[:, METRICS.index("Dice")], strict=True))
    points = [(q, float(d)) for c, d in dice.items() if (q := page.quality(c)) is not None and not np.isnan(d)]
    if not points:
        return ""
    title = "True Dice"
    columns = np.array(points).T
    if len(points) > 2 and (columns.std(1) > 0).all():
        title += f" (correlation {np.corrcoef(columns)[0, 1]:.2f}, n = {len(points)})"
    return scatter_chart(title, points, _quality_name(page))


def _quality_name(page: _Page) -> str:
    estimated = any(record.quality for record in page.manifest.cases.values())
    return "estimated Dice" if estimated else "share of consensus"


def _ranking(page: _Page) -> str:
    text = f"Ranked by {_quality_name(page)}; annotated, failed and left-out cases are not ranked."
    return f"{text} {ESTIMATE_MEANING}" if _quality_name(page) == "estimated Dice" else text


def _sheet(page: _Page, rank: str, case: str, picture: str) -> str:
    quality = page.quality(case)
    text = f"{rank}: {case}, {_quality_name(page)} {quality:.3f}" if quality is not None else f"{rank}: {case}"
    name = escape(text, quote=True)
    return f'<figure><figcaption>{name}</figcaption><img alt="{name}" src="{picture}"></figure>'


def _cases_table(page: _Page) -> str:
    outliers = volume_outliers({c: f for c, f in page.facts.items() if page.manifest.cases[c].status != "failed"})
    names = sorted(page.dataset.class_names.items())
    unit = "pixels" if page.dataset.file_ending in PLAIN_FORMATS else "ml"
    head = ["picture", "case", "status", "round", "estimated Dice", "divergence %", "Dice to the round before"]
    head += [f"{name}, {unit}" for _, name in names]
    head += ["true Dice"] if page.scores is not None else []
    true = {} if page.scores is None else dict(zip(page.scores.cases, page.scores.case_mean()[:, 0], strict=True))
    order = [*page.ranked, *sorted(set(page.facts) - set(page.ranked))]
    rows = []
    for case in order:
        record, fact = page.manifest.cases[case], page.facts[case]
        row = _case_cells(case, record, fact)
        row += [_volume_cell(fact.volumes[v], outliers.get(case, {}).get(v)) for v, _ in names]
        row += [_number_cell(true.get(case))] if page.scores is not None else []
        rows.append([*row, _cell(_note(record, page.dataset.class_names))])
    return _table([*head, "note"], rows)


def _note(record: CaseRecord, class_names: Mapping[int, str]) -> str:
    """Why the label is as it is, and what people said of it."""
    review = record.review or {}
    said = [review.get("decision"), "flagged" if review.get("flag") else None, review.get("comment")]
    return "; ".join(text for text in (record.reason, low_estimate(record, class_names), *said) if text)


def _case_cells(case: str, record: CaseRecord, fact: CaseFacts) -> list[str]:
    last = fact.agreement[max(fact.agreement)] if fact.agreement else None
    divergence = None if record.divergence is None or record.status in DRAWN else 100 * record.divergence
    return [
        f'<td data-sort="{escape(case, quote=True)}"><img loading="lazy" alt="" src="{fact.picture}"></td>',
        _cell(case),
        _cell(record.status),
        _number_cell(record.round, 0),
        _number_cell(record.quality["mean"] if record.quality else None),
        _number_cell(divergence, 2),
        _number_cell(last),
    ]


def _volume_cell(volume: float, score: float | None) -> str:
    if score is None:
        return _number_cell(volume, 1)
    return f'<td class="number bad" data-sort="{volume}" title="robust z {score:+.1f}">{volume:.1f} ({score:+.1f})</td>'


def _number_cell(value: float | None, digits: int = 3) -> str:
    if value is None or np.isnan(value):
        # Cases without a figure stay together below those with one.
        return '<td class="number" data-sort="-1"></td>'
    return f'<td class="number" data-sort="{value}">{value:.{digits}f}</td>'


def _cell(text: str) -> str:
    return f"<td>{escape(text)}</td>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    heads = "".join(f'<th scope="col"><button type="button">{escape(h)}</button></th>' for h in head)
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>"


def _settings(manifest: Manifest) -> str:
    sources = {name: source.model_dump() for name, source in manifest.sources.items()}
    content = {"settings": manifest.settings, "sources": sources, "versions": manifest.versions}
    return json.dumps(content, indent=2, default=str)


def _check_folder(path: Path) -> None:
    if not path.parent.is_dir():
        raise OneShotError(f"expected a folder to write {path.name} to, found no folder {path.parent}; make it first")


def _write(path: Path, content: str) -> None:
    partial = path.with_name(path.name + ".part")
    try:
        partial.write_text(content, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise OneShotError(f"cannot write {path} ({error.strerror}); choose a folder that you may write to") from error
