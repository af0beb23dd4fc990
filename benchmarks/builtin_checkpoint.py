"""What a SAM2 checkpoint carries on real data, mode by mode and lever by lever, with registration beside it.

    python benchmarks/builtin_checkpoint.py --work DIR [--sets hippocampus chaos_mr_t2 acdc_mr hc18_us phantom]
                                            [--methods self across ...] [--annotated default|all] [--cases N]
                                            [--checkpoint builtin] [-np 2]

Every row is one set, annotated case and method: mean foreground Dice over the un-annotated pool cases (with one
annotated slice a volume: over the other slices), per view and fused, accuracy inside consensus and divergence, median
seconds; beside it fused by majority rather than by shape. Finished rows are small JSON files in benchmarks/results/ and
are not computed again; `--work` keeps the labels that registration and relays carried, which prompt `self` mode and
are fused with, and the scores of an interrupted row.

Protocol. The annotated case's label is all that any method is given (with one annotated slice a volume: that slice);
other pool labels are read for scoring alone, test cases never. `phantom` is made by nnunet_oneshot.phantom, which the
checkpoint's training never used. Seed 0 throughout.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import multiprocessing
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import markdown, phantom, read_row, write_row
from registration import dice, read_image, read_label, split_of, voxel_shares
from tqdm import tqdm

from nnunet_oneshot.consensus import view_weights
from nnunet_oneshot.phantom import KINDS
from sam2_propagation.adaptation import apply_warp, draw_warp
from sam2_propagation.checkpoints import load_checkpoint
from sam2_propagation.consensus import fuse
from sam2_propagation.interface import Image, LabelVolume, Propagation, Support
from sam2_propagation.registration import RegistrationPropagator
from sam2_propagation.relay import RelayPropagator, Vote
from sam2_propagation.sam2 import Sam2Propagator
from sam2_propagation.sam2_settings import TURNED, Sam2Settings
from sam2_propagation.views import EVERY_PLANE

SETS = ("hippocampus", "chaos_mr_t2", "acdc_mr", "hc18_us", "phantom")
REGISTRATION = "registration"
PHANTOM_CASES = [f"phantom_{number:03d}" for number in range(1, 12)]
IGNORE = 99


@dataclass(frozen=True)
class Method:
    """How SAM2 is asked.

    Attributes:
        settings: fields of Sam2Settings that differ from the defaults.
        adapt: steps of one-shot adaptation.
        prompt: whose labels prompt `self` mode: `fused` registration, its `first` view or `relay`.
        with_registration: whether registration's views are fused with SAM2's, and the relays' where these prompt.
        views: other than the default ones.
        copies: warped copies of the annotated case that are supports beside it (arXiv 2503.04826: each query slice is
            matched to the nearest of many augmented copies of the support slices).
        supports: annotated cases, the set's other choices after the one that the row is of; these are not scored.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    adapt: int = 0
    prompt: str | None = None
    with_registration: bool = False
    views: tuple[str, ...] | None = None
    copies: int = 0
    supports: int = 1


def _self(**settings: Any) -> Method:
    return Method({"mode": "self", **settings}, prompt="fused", views=("identity",))


METHODS: dict[str, Method] = {
    "self": Method({"mode": "self"}, prompt="fused"),
    "self_registration": Method({"mode": "self"}, prompt="fused", with_registration=True),
    "self_relay": Method({"mode": "self"}, prompt="relay", with_registration=True),
    "self_relay_adapt150": Method({"mode": "self"}, adapt=150, prompt="relay", with_registration=True),
    "self_turns_relay": Method({"mode": "self"}, prompt="relay", with_registration=True, views=TURNED),
    "across": Method({"mode": "retrieve"}),
    "across_supports2": Method({"mode": "retrieve"}, supports=2),
    "across_supports3": Method({"mode": "retrieve"}, supports=3),
    "across_registration": Method({"mode": "retrieve"}, with_registration=True),
    "self_turns_registration": Method({"mode": "self"}, prompt="fused", with_registration=True, views=TURNED),
    "self_adapt150": Method({"mode": "self"}, adapt=150, prompt="fused"),
    "self_adapt150_registration": Method({"mode": "self"}, adapt=150, prompt="fused", with_registration=True),
    "across_adapt150": Method({"mode": "retrieve"}, adapt=150),
    "slice": Method({"mode": "slice"}),
    "slice_adapt150": Method({"mode": "slice"}, adapt=150),  # on every volume's annotated slice
    # Levers, one view each; beside them the same view of the default.
    "lever_self": _self(),
    "lever_prompt_first_view": Method({"mode": "self"}, prompt="first", views=("identity",)),
    "lever_memory2": _self(memory_slices=2),
    "lever_memory8": _self(memory_slices=8),
    "lever_not_own_slice": _self(own_slice=False),
    "lever_support2": _self(support_slices=2),
    "lever_repeat2": _self(repeats=2),
    "lever_whole": _self(zoom=None),
    "lever_zoom50": _self(zoom=0.5),
    "lever_zoom100": _self(zoom=1.0),
    "lever_across": Method({"mode": "retrieve"}, views=("identity",)),
    "lever_across_line": Method({"mode": "retrieve", "matching": "line"}, views=("identity",)),
    "lever_across_similarity": Method({"mode": "retrieve", "matching": "similarity"}, views=("identity",)),
    "lever_across_near": Method({"mode": "retrieve", "matching": "near"}, views=("identity",)),
    "lever_across_copies": Method({"mode": "retrieve", "matching": "near"}, views=("identity",), copies=12),
    "lever_across_copies_anywhere": Method(
        {"mode": "retrieve", "matching": "similarity"}, views=("identity",), copies=12
    ),
    "lever_across_memory2": Method({"mode": "retrieve", "memory_slices": 2}, views=("identity",)),
    "lever_across_memory8": Method({"mode": "retrieve", "memory_slices": 8}, views=("identity",)),
    "lever_across_aligned": Method({"mode": "retrieve", "align": True}, views=("identity",)),
    "lever_across_tracked": Method({"mode": "retrieve", "track": True}, views=("identity",)),
    "lever_insert1": Method({"mode": "insert", "insertions": 1}, views=("identity",)),
    "lever_insert5": Method({"mode": "insert", "insertions": 5}, views=("identity",)),
    "lever_self_planes": Method({"mode": "self"}, prompt="fused", views=EVERY_PLANE),
    "lever_across_planes": Method({"mode": "retrieve"}, views=EVERY_PLANE),
}
MAIN = (REGISTRATION, "self", "self_registration", "across", "across_registration", "slice")


class Recorded:
    """Prompts with labels that are there already, so that registration is timed by itself and done once."""

    name, views, default_views, whole_set = "recorded", ("recorded",), ("recorded",), False

    def __init__(self) -> None:
        self.label: LabelVolume | None = None

    def fit(self, images: Any) -> None:
        """Nothing to learn."""

    def adapt(self, supports: Any, views: Any) -> None:
        """Nothing to learn."""

    def propagate(self, supports: Any, queries: Any, views: Sequence[str]) -> Any:
        """The label that was set, for each query."""
        for query in queries:
            reason = None if self.label is not None else "registration failed"
            yield Propagation(query.case, views[0], self.label, reason=reason)


@dataclass(frozen=True)
class Row:
    """What one row is of; workers get it with each case."""

    name: str
    annotated: str
    method: str
    checkpoint: str
    config: str | None
    digest: str
    work: Path

    @property
    def file(self) -> str:
        """The row's name in benchmarks/results/."""
        if self.method == REGISTRATION:
            return f"builtin_{self.name}_{self.annotated}_{self.method}"
        return f"builtin_{self.name}_{self.annotated}_{self.method}_{self.digest[:8]}"


def read_case(name: str, case: str) -> tuple[Image, Callable[[], LabelVolume]]:
    """An image, and what reads its true label."""
    if name == "phantom":
        made = phantom(KINDS["thick_slices"], int(case.rsplit("_", 1)[1]))
        return made.image, lambda: made.label
    return read_image(name, case), lambda: read_label(name, case)


def pool(name: str, choice: str) -> list[tuple[str, list[str]]]:
    """Annotated cases and their queries."""
    if name == "phantom":
        return [(PHANTOM_CASES[0], PHANTOM_CASES[1:])]
    split = split_of(name)
    chosen = [split["annotated_default"]] if choice == "default" else split["annotated_choices"]
    return [(annotated, [case for case in split["pool"] if case != annotated]) for annotated in chosen]


@cache
def _support(name: str, annotated: str) -> Support:
    image, label = read_case(name, annotated)
    return Support(image, label())


def warped_copies(support: Support, count: int) -> list[Support]:
    """Copies of an annotated case as other subjects would show it, warped as one-shot adaptation warps them."""
    image = support.image.data[0]
    low, high = np.percentile(image, (0.5, 99.5))
    scaled = torch.from_numpy(((image - low) / (high - low)).clip(0, 1).astype(np.float32))
    label = torch.from_numpy(support.label.astype(np.int64))
    copies = []
    for number in range(count):
        moved, values = apply_warp(scaled, label, draw_warp(np.random.default_rng([0, number]), len(image), 1.0))
        data = (moved.numpy() * (high - low) + low)[None].astype(np.float32)
        shown = dataclasses.replace(support.image, case=f"copy{number}", data=data)
        copies.append(Support(shown, values.numpy().astype(np.int16)))
    return copies


def annotated_cases(name: str, annotated: str, count: int) -> list[str]:
    """The annotated case and as many more of the set's choices as make `count`."""
    choices = PHANTOM_CASES if name == "phantom" else split_of(name)["annotated_choices"]
    return [annotated, *(case for case in choices if case != annotated)][:count]


@cache
def _supports(name: str, annotated: str, count: int, copies: int) -> list[Support]:
    supports = [_support(name, case) for case in annotated_cases(name, annotated, count)]
    return [*supports, *warped_copies(supports[0], copies)]


def make_propagator(row: Row, cases: Sequence[str]) -> Sam2Propagator:
    """SAM2 as the row's method asks for it, adapted where it says so to what the method is given."""
    method = METHODS[row.method]
    settings = dataclasses.replace(Sam2Settings(), **method.settings)
    made = Sam2Propagator(row.checkpoint, row.config, adapt=method.adapt, prompter=Recorded(), settings=settings)
    if method.adapt:
        in_slices = method.settings["mode"] == "slice"
        supports = [_sparse(row, case) for case in cases] if in_slices else [_support(row.name, row.annotated)]
        made.adapt(supports, method.views or made.fitting_views(supports))
    return made


_PROPAGATOR: list[Sam2Propagator] = []
"""This worker's own."""
_RELAY: list[RelayPropagator] = []


def _begin_worker(propagator: Sam2Propagator | None, relay: RelayPropagator | None = None) -> None:
    torch.set_num_threads(1)
    _PROPAGATOR[:] = [] if propagator is None else [propagator]
    _RELAY[:] = [] if relay is None else [relay]


@dataclass(frozen=True)
class Carried:
    """What registration said of a row's queries, for relays."""

    row: Row
    queries: tuple[str, ...]

    def cases(self) -> Sequence[str]:
        """All queries."""
        return self.queries

    def image(self, case: str) -> Image:
        """A query's image."""
        return read_case(self.row.name, case)[0]

    def votes(self, case: str) -> list[Vote]:
        """Registration's views that may be used."""
        known = registered(self.row, self.image(case))
        return [Vote(label, known["similar"][view]) for view, label in known["labels"].items()]


def _register(task: tuple[Row, str]) -> None:
    registered(task[0], read_case(task[0].name, task[1])[0])


def make_relay(row: Row, cases: Sequence[str], processes: int) -> RelayPropagator:
    """Relays chosen for one row, after registration has done all its queries."""
    with multiprocessing.get_context("spawn").Pool(processes, _begin_worker, (None,)) as workers:
        list(tqdm(workers.imap_unordered(_register, [(row, case) for case in cases]), "registration", len(cases)))
    relay = RelayPropagator(Carried(row, tuple(cases)), threads=1)
    relay.adapt([_support(row.name, row.annotated)], relay.default_views)
    return relay


def relayed(row: Row, query: Image) -> tuple[LabelVolume | None, float]:
    """What relays and registration together say of a query, and seconds; from the working folder where it is there."""
    path = (
        row.work / "relay" / row.name / f"{row.annotated}_of_{len(_RELAY[0].registered.cases())}" / f"{query.case}.npz"
    )
    if not path.is_file():
        begin = time.process_time()
        (said,) = _RELAY[0].propagate([], [query], _RELAY[0].default_views)
        path.parent.mkdir(parents=True, exist_ok=True)
        label = {} if said.label is None else {"label": said.label}
        np.savez_compressed(path, seconds=time.process_time() - begin, **label)  # type: ignore[arg-type]
    with np.load(path) as kept:
        return kept.get("label"), float(kept["seconds"])


def _has_similarities(path: Path) -> bool:
    """False for what an older run kept, which no relay can use."""
    with np.load(path) as kept:
        return any(key.startswith("_similar_") for key in kept)


def registered(row: Row, query: Image) -> dict[str, Any]:
    """Registration's labels and similarities by view, and its seconds; from the working folder where they are there."""
    path = row.work / "registration" / row.name / row.annotated / f"{query.case}.npz"
    views = RegistrationPropagator.default_views
    if not path.is_file() or not _has_similarities(path):
        begin = time.process_time()
        support = _support(row.name, row.annotated)
        results = list(RegistrationPropagator(threads=1).propagate([support], [query], views))
        labels = {r.view: r.label for r in results if r.label is not None}
        similar = {f"_similar_{r.view}": r.scores["similarity_after"] for r in results if r.label is not None}
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = {"_seconds": time.process_time() - begin, **similar, **labels}
        np.savez_compressed(path, **kept)  # type: ignore[arg-type]
    with np.load(path) as kept:
        given = [view for view in views if view in kept]
        return {
            "seconds": float(kept["_seconds"]),
            "labels": {view: kept[view] for view in given},
            "similar": {view: float(kept[f"_similar_{view}"]) for view in given},
        }


def annotated_slice(truth: LabelVolume) -> int:
    """The slice with the largest foreground."""
    return int((truth > 0).sum(axis=(1, 2)).argmax())


def _sparse(row: Row, case: str) -> Support:
    """A case with one annotated slice."""
    image, truth = read_case(row.name, case)
    label, at = truth(), annotated_slice(truth())
    return Support(image, np.where(np.arange(len(label))[:, None, None] == at, label, IGNORE).astype(np.int16), IGNORE)


def score_case(task: tuple[Row, str]) -> dict[str, Any]:
    """Label one case, then read its truth and score."""
    row, case = task
    query, truth = read_case(row.name, case)
    if row.method == REGISTRATION:
        carried = registered(row, query)
        return {"case": case, "seconds": carried["seconds"], **figures(query, carried["labels"], truth(), None)}
    method = METHODS[row.method]
    in_slices = method.settings["mode"] == "slice"
    carried = {} if in_slices or not (method.prompt or method.with_registration) else registered(row, query)["labels"]
    by_relays, relaying = relayed(row, query) if method.prompt == "relay" else (None, 0.0)
    supports = [_sparse(row, case)] if in_slices else _supports(row.name, row.annotated, method.supports, method.copies)
    begin = time.process_time()
    labels = _sam2(row, supports, query, _prompt(method, carried) if by_relays is None else by_relays)
    seconds = time.process_time() - begin
    if method.with_registration:
        # Last, as `propagate` has them: ties go to SAM2.
        labels |= {} if by_relays is None else {"relay/relayed": by_relays}
        labels |= {f"registration/{view}": label for view, label in carried.items()}
    left_out = annotated_slice(truth()) if in_slices else None
    scores = figures(query, labels, truth(), left_out)
    return {"case": case, "seconds": seconds, "relaying": relaying, **scores}


def _prompt(method: Method, labels: Mapping[str, LabelVolume]) -> LabelVolume | None:
    if method.prompt is None or not labels:
        return None
    every = list(labels.values())
    return every[0] if method.prompt == "first" else fuse(every).label


def _sam2(row: Row, supports: list[Support], query: Image, prompt: LabelVolume | None) -> dict[str, LabelVolume]:
    propagator = _PROPAGATOR[0]
    prompter = propagator.prompter
    assert isinstance(prompter, Recorded)
    prompter.label = prompt
    views = METHODS[row.method].views or propagator.fitting_views(supports)
    return {r.view: r.label for r in propagator.propagate(supports, [query], views) if r.label is not None}


def figures(
    query: Image, labels: Mapping[str, LabelVolume], truth: LabelVolume, left_out: int | None
) -> dict[str, Any]:
    """Dice of every view and of the fused label, and how many voxels are right where."""
    classes = [int(value) for value in np.unique(truth) if value]
    if not labels:
        return {
            "views": {},
            "fused": 0.0,
            "majority": 0.0,
            "per_class": dict.fromkeys(map(str, classes), 0.0),
            "voxels": None,
        }
    scored = np.array([i for i in range(len(truth)) if i != left_out])
    weights = view_weights([name if "/" in name else f"sam2/{name}" for name in labels])
    fused, truth = fuse(list(labels.values()), weights, query.spacing), truth[scored]
    majority = fuse(list(labels.values())).label[scored]
    label, agreed = fused.label[scored], fused.agreed[scored]
    right = label == truth
    voxels = {"consensus": agreed, "consensus_right": right & agreed}
    voxels |= {"divergence": ~agreed, "divergence_right": right & ~agreed}
    return {
        "views": {view: dice(each[scored], truth, classes) for view, each in labels.items()},
        "fused": dice(label, truth, classes),
        "majority": dice(majority, truth, classes),
        **_by_weight(labels, query.spacing, scored, truth, classes),
        **_by_relay_weight(labels, weights, query.spacing, scored, truth, classes),
        "per_class": {str(c): dice(label, truth, [c]) for c in classes if ((label == c) | (truth == c)).any()},
        "voxels": {key: int(where.sum()) for key, where in voxels.items()},
    }


WEIGHTS = (1, 2, 4, 8)
"""Of each of SAM2's views, where each of registration's weighs 1."""
RELAY_WEIGHTS = (1, 3, 8)
"""Of the relays' view, where each of registration's weighs 1 and SAM2's what they do by default."""
_WEIGHED = (
    "sam2_alone",
    *(f"sam2_weighs_{weight}" for weight in WEIGHTS),
    *(f"relay_weighs_{weight}" for weight in RELAY_WEIGHTS),
    *(f"without_sam2_relay_weighs_{weight}" for weight in RELAY_WEIGHTS),
)


def _by_weight(
    labels: Mapping[str, LabelVolume], spacing: tuple[float, ...], scored: Any, truth: LabelVolume, classes: list[int]
) -> dict[str, float]:
    """Dice of SAM2's views fused by themselves, and with registration's by every weight; empty for one source."""
    own = [label for name, label in labels.items() if "/" not in name]
    others = [label for name, label in labels.items() if "/" in name]
    if not own or not others:
        return {}
    alone = {"sam2_alone": dice(fuse(own, spacing=spacing).label[scored], truth, classes)}
    return alone | {
        f"sam2_weighs_{w}": dice(
            fuse([*own, *others], [w] * len(own) + [1] * len(others), spacing).label[scored], truth, classes
        )
        for w in WEIGHTS
    }


def _by_relay_weight(
    labels: Mapping[str, LabelVolume],
    weights: Sequence[float],
    spacing: tuple[float, ...],
    scored: Any,
    truth: LabelVolume,
    classes: list[int],
) -> dict[str, float]:
    """Dice by what the relays' view weighs, with SAM2's views and without; empty where there is no such view."""
    if "relay/relayed" not in labels:
        return {}
    found = {}
    for start, names in (("", list(labels)), ("without_sam2_", [name for name in labels if "/" in name])):
        others = dict(zip(labels, weights, strict=True))
        for weight in RELAY_WEIGHTS:
            each = [float(weight) if name == "relay/relayed" else others[name] for name in names]
            if sum(each) > 0:
                fused = fuse([labels[name] for name in names], each, spacing).label[scored]
                found[f"{start}relay_weighs_{weight}"] = dice(fused, truth, classes)
    return found


def run_row(row: Row, cases: list[str], processes: int) -> dict[str, Any]:
    """One row, from its file if it is there."""
    done = read_row(row.file)
    if done is not None and done["n"] >= len(cases):
        return done
    partial = row.work / f"{row.file}.partial"
    lines = partial.read_text(encoding="utf-8").splitlines() if partial.exists() else []
    entries = {entry["case"]: entry for entry in map(json.loads, lines)}
    tasks = [(row, case) for case in cases if case not in entries]
    propagator = None if row.method == REGISTRATION or not tasks else make_propagator(row, cases)
    by_relays = row.method != REGISTRATION and METHODS[row.method].prompt == "relay"
    relay = make_relay(row, cases, processes) if tasks and by_relays else None
    context = multiprocessing.get_context("spawn")
    with (
        context.Pool(processes, _begin_worker, (propagator, relay)) as workers,
        partial.open("a", encoding="utf-8") as file,
    ):
        for entry in tqdm(workers.imap_unordered(score_case, tasks), row.file, len(tasks)):
            file.write(json.dumps(entry) + "\n")
            file.flush()
            entries[entry["case"]] = entry
    done = write_row(row.file, summary(row, [entries[case] for case in cases], processes))
    partial.unlink()
    return done


def summary(row: Row, entries: list[dict[str, Any]], processes: int) -> dict[str, Any]:
    """Means over cases; voxel shares pooled over them."""
    classes = sorted({c for e in entries for c in e["per_class"]})
    views = sorted({view for e in entries for view in e["views"]})
    return {
        "set": row.name,
        "annotated": row.annotated,
        "method": row.method,
        "settings": None if row.method == REGISTRATION else dataclasses.asdict(METHODS[row.method]),
        "checkpoint": None if row.method == REGISTRATION else {"name": Path(row.checkpoint).name, "sha256": row.digest},
        "n": len(entries),
        "fused": float(np.mean([e["fused"] for e in entries])),
        "fused_by_majority": float(np.mean([e["majority"] for e in entries])),
        **{key: float(np.mean([e.get(key, e["fused"]) for e in entries])) for key in _WEIGHED if key in entries[0]},
        "views": {view: float(np.mean([e["views"].get(view, 0.0) for e in entries])) for view in views},
        "per_class": {c: float(np.mean([e["per_class"][c] for e in entries if c in e["per_class"]])) for c in classes},
        **voxel_shares([e["voxels"] for e in entries if e["voxels"]]),
        "median_cpu_seconds": float(np.median([e["seconds"] for e in entries])),
        "median_cpu_seconds_relaying": float(np.median([e.get("relaying", 0.0) for e in entries])),
        "processes": processes,
        "seed": 0,
        "fused_per_case": {e["case"]: round(e["fused"], 4) for e in entries},
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    head = [
        "set",
        "annotated",
        "method",
        "n",
        "Dice, fused",
        "best view",
        "in consensus",
        "in divergence",
        "divergence",
    ]
    head += ["CPU s a case"]
    lines = []
    for row in rows:
        shares = [row.get(key) for key in ("accuracy_in_consensus", "accuracy_in_divergence", "divergence")]
        best = max(row["views"].values(), default=0.0)
        lines.append(
            [row["set"], row["annotated"], row["method"], row["n"], f"{row['fused']:.3f}", f"{best:.3f}"]
            + ["-" if share is None else f"{share:.3f}" for share in shares]
            + [f"{row['median_cpu_seconds']:.1f}"]
        )
    return markdown(head, lines)


def digest(checkpoint: str) -> str:
    """The sha256 of a checkpoint: of its file where it is one, else as loaded."""
    path = Path(checkpoint)
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    return load_checkpoint(checkpoint, None, "cpu", None).sha256 or checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description="labels carried by SAM2, measured on real data")
    parser.add_argument("--work", type=Path, required=True, help="folder for what is kept between runs")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--methods", nargs="+", choices=(REGISTRATION, *METHODS), default=list(MAIN))
    parser.add_argument("--annotated", choices=("default", "all"), default="default")
    parser.add_argument("--cases", type=int, help="only the first N pool cases of each set")
    parser.add_argument("--checkpoint", default="builtin", help="name or file")
    parser.add_argument("--config", help="configuration of a file that nothing else identifies")
    parser.add_argument("-np", type=int, default=2, help="processes, each of one thread")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    known, rows = digest(arguments.checkpoint), []
    for name in arguments.sets:
        for annotated, cases in pool(name, arguments.annotated):
            for method in arguments.methods:
                if name == "hc18_us" and METHODS.get(method, Method()).settings.get("mode") == "slice":
                    continue  # one slice is all that there is
                row = Row(name, annotated, method, arguments.checkpoint, arguments.config, known, arguments.work)
                given = annotated_cases(name, annotated, METHODS.get(method, Method()).supports)
                queries = [case for case in cases[: arguments.cases] if case not in given]
                rows.append(run_row(row, queries, arguments.np))
    print(table(rows))


if __name__ == "__main__":
    main()
