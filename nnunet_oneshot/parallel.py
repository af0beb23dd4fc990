"""Run one function over many cases, in this process or in several, with a progress bar."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any, TypeVar

from tqdm import tqdm

Item = TypeVar("Item")
Result = TypeVar("Result")


def default_processes() -> int:
    """The processor count this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def over_cases(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    *,
    processes: int,
    title: str,
    setup: Callable[..., None] | None = None,
    setup_arguments: tuple[Any, ...] = (),
) -> Iterator[Result]:
    """Yield `function(item)` for every item as it is done, in any order.

    Args:
        function: a function of a module (workers are spawned and import it).
        processes: 1 or less runs everything in this process.
        title: the progress bar's text.
        setup: called once in each process with `setup_arguments` before its first item.
    """
    bar = tqdm(total=len(items), desc=title, unit="case", disable=not items, file=sys.stderr, mininterval=0.5)
    with bar:
        results = (
            _here(function, items, setup, setup_arguments)
            if min(processes, len(items)) <= 1
            else _in_processes(function, items, min(processes, len(items)), setup, setup_arguments)
        )
        for result in results:
            bar.update()
            yield result


def _here(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    setup: Callable[..., None] | None,
    arguments: tuple[Any, ...],
) -> Iterator[Result]:
    if setup is not None and items:
        setup(*arguments)
    for item in items:
        yield function(item)


def _in_processes(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    processes: int,
    setup: Callable[..., None] | None,
    arguments: tuple[Any, ...],
) -> Iterator[Result]:
    threads = max(1, default_processes() // processes)
    pool = ProcessPoolExecutor(
        processes,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(threads, setup, arguments),
    )
    try:
        for future in as_completed([pool.submit(function, item) for item in items]):
            yield future.result()
    finally:
        # After an interruption the cases that have not begun are dropped; those under way are whole or absent.
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker(threads: int, setup: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    # Ctrl-C reaches the whole process group; the parent alone decides what then happens.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # For libraries that load later, and for torch where the setup's own imports have brought it already; importing it
    # here would cost every worker seconds that label arithmetic does not need.
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)
    if setup is not None:
        setup(*arguments)
