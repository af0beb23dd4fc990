"""The training curve of one of the built-in checkpoint's runs, from the log that it wrote: a picture and a table.

    python benchmarks/pretraining_curve.py [--log LOG] [-o PNG]

The picture shows the loss, a mean over 100 steps, and the Dice of each kind of held-out task; the table, printed, has
the validations. `LOG` is the `log.jsonl` of a run's folder; by default that of the last run behind the weights in the
package, on a GPU, which is kept in benchmarks/results/ as `pretraining_4800.jsonl`, that of the run before it, is.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from common import REPOSITORY, RESULTS, markdown

TASKS = {
    "slice": "slice of the same volume",
    "subject": "another subject",
    "contrast": "another contrast",
    "self": "the query's own bad mask",
    "chain": "the sixth slice of a chain",
}
"""Kinds of held-out task, as sam2_propagation/pretraining/validation.py names and the docs call them."""
WINDOW = 10
"""Log lines, of ten steps each, that the loss is averaged over."""

Entry = dict[str, float]


def read_log(path: Path) -> list[Entry]:
    """The log's entries in the order of their steps; of a step done twice, since a run was killed, the last."""
    entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [entry for _, entry in sorted({entry["step"]: entry for entry in entries}.items())]


def draw(log: list[Entry], path: Path) -> None:
    """Write the picture."""
    figure, (above, below) = plt.subplots(2, 1, figsize=(7, 7), sharex=True, layout="constrained")
    lossy, judged = [e for e in log if "loss" in e], [e for e in log if "slice" in e]
    smooth = np.convolve([e["loss"] for e in lossy], np.full(WINDOW, 1 / WINDOW), mode="valid")
    above.plot([e["step"] for e in lossy[WINDOW - 1 :]], smooth, color="0.3")
    above.set_ylabel("training loss, mean over 100 steps")
    for name, title in _judged_tasks(judged).items():
        line = below.plot([e["step"] for e in judged], [e[name] for e in judged], marker="o", label=title)[0]
        below.axhline(judged[-1][f"{name}_copied"], color=line.get_color(), linestyle=":")
    below.set_ylabel("Dice on held-out synthetic anatomy\n(dotted: the memory's mask as it is)")
    below.set_xlabel("steps")
    below.set_ylim(None, 1)
    below.legend(loc="upper left", ncols=2)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def table(log: list[Entry]) -> str:
    """The validations, and what the memory's mask as it is would give."""
    judged = [e for e in log if "slice" in e]
    tasks = _judged_tasks(judged)
    copied = ["the memory's mask as it is", *(f"{judged[-1][f'{name}_copied']:.3f}" for name in tasks)]
    rows = [[int(e["step"]), *(f"{e[name]:.3f}" for name in tasks)] for e in judged]
    return markdown(["steps", *tasks.values()], [copied, *rows])


def _judged_tasks(judged: list[Entry]) -> dict[str, str]:
    """Those that the run was judged by; older runs knew no chains."""
    return {name: title for name, title in TASKS.items() if name in judged[-1]}


def main() -> None:
    parser = argparse.ArgumentParser(description="the training curve of the built-in checkpoint")
    parser.add_argument("--log", type=Path, default=RESULTS / "pretraining_1550_gpu.jsonl")
    parser.add_argument("-o", type=Path, default=REPOSITORY / "docs" / "pictures" / "pretraining_curve.png")
    arguments = parser.parse_args()
    log = read_log(arguments.log)
    draw(log, arguments.o)
    print(table(log))


if __name__ == "__main__":
    main()
