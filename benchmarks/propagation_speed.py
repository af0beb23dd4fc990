"""How fast labels are carried: ours beside the published procedure as the stock video predictor runs it.

    python benchmarks/propagation_speed.py speed  [-config sam2.1_hiera_tiny@256] [-o FILE]
    python benchmarks/propagation_speed.py parity [-o FILE]
    python benchmarks/propagation_speed.py memory [-slices 600] [-size 512] [-o FILE]

`speed`: SSL-MedSAM2's procedure (each annotated stack inserted in the query's sequence at several places, tracked out
of it both ways) for 1, 2, 4 supports x 1, 2 insertions, on the same phantoms and random weights: driven by the stock
predictor, by our engine, and beside them our own modes with the same supports. Encoder passes and track steps are
counted by wrapping `forward_image` and `track_step`. A straight line in supports x insertions extends the measured
points to 10 x 5 (called extrapolated). Supports, which ours encodes once for all queries, count with this one query;
the `..._next_query` rows are what each further query costs. Seconds are of processor time, so with one thread other
work on the machine does not count. `parity`: largest difference of mask logits from the stock predictor. `memory`: peak
resident memory of one long stack.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from sam2.sam2_video_predictor import SAM2VideoPredictor

from sam2_propagation.architecture import SAM2Base, at_size, known_configurations
from sam2_propagation.checkpoints import load_checkpoint
from sam2_propagation.embeddings import Encoder
from sam2_propagation.intensities import ImageSlices, scale
from sam2_propagation.interface import Image, LabelVolume, Propagation, Support
from sam2_propagation.sam2 import Sam2Propagator
from sam2_propagation.sam2_settings import Sam2Settings, recipe
from sam2_propagation.tracker import Memory, Tracker, at_slice_size, prompt_masks

PUBLISHED = (10, 5)
POINTS = ((1, 1), (1, 2), (2, 1), (2, 2), (4, 1), (4, 2))


class Counter:
    """Counts and times a model's own encoder passes and track steps."""

    def __init__(self, model: SAM2Base) -> None:
        self.counts = {"encoder_passes": 0, "track_steps": 0}
        self.seconds = 0.0
        self._wrap(model, "forward_image", "encoder_passes", lambda a, _: len(a[0]))
        self._wrap(model, "track_step", "track_steps", lambda _, k: k["current_vision_feats"][-1].shape[1])

    def _wrap(self, model: SAM2Base, method: str, name: str, size: Callable[[Any, Any], int]) -> None:
        original = getattr(model, method)

        def counted(*args: Any, **kwargs: Any) -> Any:
            begin = time.process_time()
            out = original(*args, **kwargs)
            self.seconds += time.process_time() - begin
            self.counts[name] += size(args, kwargs)
            return out

        setattr(model, method, counted)

    def reset(self) -> None:
        self.counts = dict.fromkeys(self.counts, 0)
        self.seconds = 0.0


class Copy:
    """Prompts `self` mode at no cost, so that what is timed is SAM2 alone: the first support's label, stretched."""

    name, views, default_views, whole_set = "copy", ("identity",), ("identity",), False

    def fit(self, images: Any) -> None:
        pass

    def propagate(self, supports: Sequence[Support], queries: Any, views: Sequence[str]) -> Iterator[Propagation]:
        for query in queries:
            label = supports[0].label
            nearest = np.arange(query.shape[0]) * len(label) // query.shape[0]
            yield Propagation(query.case, views[0], label[nearest])


def phantom(case: str, slices: int, size: int, seed: int) -> Support:
    """A noisy ellipsoid and its label."""
    rng = np.random.default_rng(seed)
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in (slices, size, size)), indexing="ij")
    centre = rng.uniform(-0.2, 0.2, 2)
    label = (0.5 * z**2 + (y - centre[0]) ** 2 + (x - centre[1]) ** 2 < 0.3).astype(np.int16)
    data = (100 + 80 * label + rng.normal(0, 15, label.shape)).astype(np.float32)
    return Support(Image(case, data[None], spacing=(5.0, 1.0, 1.0)), label)


def stock_predictor(config: Mapping[str, Any], model: SAM2Base) -> SAM2VideoPredictor:
    """sam2's own predictor with the model's weights."""
    tree = dict(config["model"], _target_="sam2.sam2_video_predictor.SAM2VideoPredictor")
    stock = instantiate(OmegaConf.create(tree)).eval()
    stock.load_state_dict(model.state_dict())
    # In float32 the stock predictor fails where no object pointer joins its bfloat16 memories; published code runs it
    # under autocast. The cast changes no value.
    stock.memory_attention.register_forward_pre_hook(
        lambda _m, args, kw: (args, {**kw, "memory": kw["memory"].float()}), with_kwargs=True
    )
    return stock


@contextmanager
def stock_state(stock: SAM2VideoPredictor, frames: torch.Tensor, size: int) -> Iterator[Any]:
    """An inference state over frames in memory; the stock loader only takes folders of JPEG files."""
    with (
        mock.patch("sam2.sam2_video_predictor.load_video_frames", return_value=(frames, size, size)),
        mock.patch("sam2.sam2_video_predictor.tqdm", lambda it, **_: it),
    ):
        yield stock.init_state("frames")


def published_procedure(
    stock: SAM2VideoPredictor, supports: Sequence[Support], query: Image, positions: Sequence[int]
) -> LabelVolume:
    """SSL-MedSAM2's procedure, driven by the stock predictor."""
    size, slices = stock.image_size, query.shape[0]
    seen = ImageSlices(scale(query), size).batch(range(slices))
    total = torch.zeros(slices, size, size)
    for support in supports:
        stack = ImageSlices(scale(support.image), size).batch(range(support.image.shape[0]))
        for position in positions:
            frames = torch.cat([seen[:position], stack, seen[position:]])
            with stock_state(stock, frames, size) as state:
                total += _tracked(stock, state, support.label, position, slices)
    return (total / (len(supports) * len(positions)) > 0.5).numpy().astype(np.int16)


def _tracked(stock: SAM2VideoPredictor, state: Any, label: LabelVolume, position: int, slices: int) -> torch.Tensor:
    last = position + len(label) - 1
    # Slices of the stack without a mask do not prompt: they are tracked like the query's.
    drawn = [i for i, mask in enumerate(label) if mask.any()]
    out = torch.zeros(slices, stock.image_size, stock.image_size)
    for reverse in (False, True):
        stock.reset_state(state)
        for i in drawn:
            stock.add_new_mask(state, position + i, 1, torch.from_numpy(label[i] > 0))
        start = position + (drawn[-1] if reverse else drawn[0])
        for frame, _, logits in stock.propagate_in_video(state, start, reverse=reverse):
            if frame < position or frame > last:
                at = frame if frame < position else frame - len(label)
                out[at] = logits[0, 0].sigmoid()
    return out


def speed(arguments: argparse.Namespace) -> dict[str, Any]:
    """Every procedure at every point, and the fits."""
    name, _, pixels = arguments.config.partition("@")
    config = at_size(known_configurations()[name], int(pixels))
    base = load_checkpoint(f"random:{arguments.config}").model
    stock = stock_predictor(config, base)
    query = phantom("query", arguments.slices, int(pixels), 100).image
    supports = [phantom(f"support{i}", arguments.support_slices, int(pixels), i) for i in range(4)]
    procedures = _procedures(arguments, stock, query)
    _warm_up(procedures, supports)
    points = []
    for s, n in POINTS:
        print(f"{s} supports x {n} insertions", flush=True)
        results = {name: run(supports[:s], n) for name, run in procedures.items()}
        points.append({"supports": s, "insertions": n, **results})
    return {"points": points, "fits": {p: _fit(points, p) for p in procedures}, "summary": _summary(points, procedures)}


Run = Callable[[Sequence[Support], int], dict[str, Any]]


def _procedures(arguments: argparse.Namespace, stock: SAM2VideoPredictor, query: Image) -> dict[str, Run]:
    counter = Counter(stock)
    places = [round(f * query.shape[0]) for f in (0.3, 0.7)]

    def published(supports: Sequence[Support], insertions: int) -> dict[str, Any]:
        return _measured(
            counter, arguments.repeats, lambda: published_procedure(stock, supports, query, places[:insertions])
        )

    def ours(settings: Sam2Settings, first: bool = True) -> Run:
        def run(supports: Sequence[Support], insertions: int) -> dict[str, Any]:
            placed = replace(settings, positions=tuple(p / query.shape[0] for p in places[:insertions]))
            prompter = Copy() if settings.mode == "self" else None
            propagator = Sam2Propagator(f"random:{arguments.config}", settings=placed, prompter=prompter)
            own = Counter(propagator.describe().model)

            def once() -> Propagation:
                if first:
                    propagator.forget_supports()
                return next(propagator.propagate(supports, [query], ("identity",)))

            if not first:
                once()
            return _measured(own, arguments.repeats, once)

        return run

    same = replace(recipe("ssl_medsam2"), largest_component=False)
    return {
        "stock": published,
        "same_procedure": ours(same),
        "retrieve": ours(Sam2Settings(mode="retrieve")),
        "self": ours(Sam2Settings(mode="self")),
        "retrieve_next_query": ours(Sam2Settings(mode="retrieve"), first=False),
        "self_next_query": ours(Sam2Settings(mode="self"), first=False),
    }


def _warm_up(procedures: Mapping[str, Run], supports: Sequence[Support]) -> None:
    """torch's first calls are slower; they are nobody's cost."""
    for name in ("stock", "retrieve"):
        procedures[name](supports[:1], 1)


def _measured(counter: Counter, repeats: int, once: Callable[[], object]) -> dict[str, Any]:
    seconds, bare = [], []
    for _ in range(repeats):
        counter.reset()
        begin = time.process_time()
        once()
        seconds.append(time.process_time() - begin)
        bare.append(counter.seconds)
    overhead = statistics.median(s / b for s, b in zip(seconds, bare, strict=True))
    return {
        **counter.counts,
        "seconds": round(statistics.median(seconds), 4),
        "over_bare_sum": round(overhead, 4),
    }


def _fit(points: Sequence[Mapping[str, Any]], procedure: str) -> dict[str, float]:
    """seconds = fixed + each * supports * insertions (for our modes: supports alone), and its value at 10 x 5."""
    inserts = procedure in ("stock", "same_procedure")
    runs = [p["supports"] * (p["insertions"] if inserts else 1) for p in points]
    each, fixed = np.polyfit(runs, [p[procedure]["seconds"] for p in points], 1)
    at = PUBLISHED[0] * (PUBLISHED[1] if inserts else 1)
    return {"fixed": float(fixed), "each": float(each), "extrapolated_at_10x5": float(fixed + each * at)}


def _summary(points: Sequence[Mapping[str, Any]], procedures: Mapping[str, Run]) -> dict[str, Any]:
    stock = _fit(points, "stock")["extrapolated_at_10x5"]
    ours = [name for name in procedures if name != "stock"]
    return {
        "ratio_extrapolated_at_10x5": {name: stock / _fit(points, name)["extrapolated_at_10x5"] for name in ours},
        "ratio_median_over_points": {
            name: statistics.median(p["stock"]["seconds"] / p[name]["seconds"] for p in points) for name in ours
        },
        "overhead_median": {name: statistics.median(p[name]["over_bare_sum"] for p in points) for name in ours},
    }


def parity(arguments: argparse.Namespace) -> dict[str, Any]:
    """Largest difference of logits over all frames, both directions, one object prompted twice."""
    names = [n for n in known_configurations() if n.startswith(("sam2.1", "sam2_"))]
    return {name: _parity_of(name, arguments.size) for name in names}


def _parity_of(name: str, pixels: int) -> dict[str, float]:
    print(name, flush=True)
    config = at_size(known_configurations()[name], pixels)
    model = _seeing(load_checkpoint(f"random:{name}@{pixels}").model)
    support = phantom("video", 8, pixels, 3)
    video = ImageSlices(scale(support.image), pixels).batch(range(8))
    with stock_state(stock := stock_predictor(config, model), video, pixels) as state:
        expected = _stock_logits(stock, state, support.label)
    found = _our_logits(model, video, support.label)
    both = [(expected[key], found[key]) for key in expected]
    return {
        "max_abs_difference": max(float((a - b).abs().max()) for a, b in both),
        "logit_range": max(float(a.max() - a.min()) for a, _ in both),
        "frames": len(both),
    }


def _seeing(model: SAM2Base) -> SAM2Base:
    """The model, sure that objects are there: random weights may deny it, and then every logit is one constant."""
    head = getattr(model.sam_mask_decoder, "pred_obj_score_head", None)
    if head is not None:
        torch.nn.init.constant_(getattr(head, "layers", [head])[-1].bias, 10.0)
    return model


PROMPTED = (3, 4)


def _stock_logits(stock: SAM2VideoPredictor, state: Any, label: LabelVolume) -> dict[tuple[bool, int], torch.Tensor]:
    out = {}
    for reverse in (False, True):
        stock.reset_state(state)
        for frame in PROMPTED:
            stock.add_new_mask(state, frame, 1, torch.from_numpy(label[frame] > 0))
        start = PROMPTED[-1] if reverse else PROMPTED[0]
        for frame, _, logits in stock.propagate_in_video(state, start, reverse=reverse):
            if frame not in PROMPTED:
                out[reverse, frame] = logits[0, 0]
    return out


class Held:
    """Frames that are in memory already."""

    def __init__(self, data: torch.Tensor) -> None:
        self._data = data

    def __len__(self) -> int:
        return len(self._data)

    def batch(self, indices: Sequence[int]) -> torch.Tensor:
        return self._data[list(indices)]


def _our_logits(model: SAM2Base, video: torch.Tensor, label: LabelVolume) -> dict[tuple[bool, int], torch.Tensor]:
    frames, tracker = Encoder(model).encode(Held(video)), Tracker(model)
    masks = prompt_masks(torch.from_numpy(label[list(PROMPTED)]), model.image_size)
    memories, _ = tracker.prompt(frames.features(PROMPTED), masks)
    prompted = {frame: memories.take([i]) for i, frame in enumerate(PROMPTED)}
    out = {}
    for reverse, order in ((False, range(PROMPTED[0], 8)), (True, range(PROMPTED[-1], -1, -1))):
        for frame, outcome in tracker.track(frames, Memory(prompted), order, reverse):
            out[reverse, frame] = at_slice_size(outcome.logits, (model.image_size, model.image_size))[0]
    return out


def memory(arguments: argparse.Namespace) -> dict[str, Any]:
    """Peak resident memory of one long stack in the default mode."""
    support = phantom("support", 20, arguments.size, 0)
    query = phantom("query", arguments.slices, arguments.size, 1).image
    propagator = Sam2Propagator(f"random:sam2.1_hiera_tiny@{arguments.size}", batch_size=arguments.batch_size)
    before, begin = _peak_gib(), time.process_time()
    next(propagator.propagate([support], [query], ("identity",)))
    return {
        "slices": arguments.slices,
        "size": arguments.size,
        "peak_gib": round(_peak_gib(), 3),
        "peak_gib_with_the_images_alone": round(before, 3),
        "seconds": round(time.process_time() - begin, 1),
    }


def _peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _machine(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average_at_start": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "arguments": {k: str(v) for k, v in vars(arguments).items() if k not in ("run", "o")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for run, defaults in ((speed, (10, 256)), (parity, (8, 128)), (memory, (600, 512))):
        command = commands.add_parser(run.__name__)
        command.add_argument("-slices", type=int, default=defaults[0], help="of the query")
        command.add_argument("-size", type=int, default=defaults[1], help="pixels, for parity and memory")
        command.add_argument("-support_slices", type=int, default=6)
        command.add_argument("-config", default="sam2.1_hiera_tiny@256", help="for speed")
        command.add_argument("-batch_size", type=int, default=4)
        command.add_argument("-repeats", type=int, default=3)
        command.add_argument("-threads", type=int, default=1)
        command.add_argument("-o", type=Path, help="JSON file")
        command.set_defaults(run=run)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    machine = _machine(arguments)
    text = json.dumps({"machine": machine, arguments.run.__name__: arguments.run(arguments)}, indent=1)
    print(text)
    if arguments.o is not None:
        arguments.o.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
