"""Run one function over many cases, in this process or in several, with a progress bar."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from tqdm import tqdm

from nnunet_oneshot.errors import OneShotError

Item = TypeVar("Item")
Result = TypeVar("Result")
_LOOK_SECONDS = 0.5
GPU_PROCESSES = 2
FEW = 20
"""So many images are read sooner than workers are there to read them."""


def default_processes() -> int:
    """The processor count this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processes_on(device: str, asked: int | None) -> int:
    """How many processes share a device: those asked for, else one a core, and no more than two a CUDA device."""
    if asked:
        return asked
    # Each holds weights, features and a CUDA context of its own in the GPU's memory.
    return min(GPU_PROCESSES, default_processes()) if device.startswith("cuda") else default_processes()


def progress_bar(title: str, total: int | None, unit: str = "it") -> tqdm[Any]:
    """A bar on standard error; a file or a cluster's log gets a line now and then, not two a second."""
    pause = 0.5 if sys.stderr.isatty() else 30.0
    return tqdm(total=total, desc=title, unit=unit, disable=total == 0, file=sys.stderr, mininterval=pause)


class _Meter:
    """Hands on the shares of items that are done; an item is never more than whole."""

    def __init__(self, add: Callable[[float], None]) -> None:
        self._add = add
        self._of_item = 0.0

    def advance(self, share: float) -> None:
        share = min(share, 1 - self._of_item)
        self._of_item += share
        self._add(share)

    def end_item(self) -> None:
        self.advance(1.0)
        self._of_item = 0.0


_METER = [_Meter(lambda _: None)]
"""This process's own."""
_STOP: list[Any] = [None]
"""In a worker what its parent sets when it takes no more results."""


def advance(share: float) -> None:
    """Say that a share (0 to 1) of the item that this process works on is done, so that the bar moves within it."""
    _METER[0].advance(share)


def over_cases(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    *,
    processes: int,
    title: str,
    few: int = 0,
    setup: Callable[..., None] | None = None,
    setup_arguments: tuple[Any, ...] = (),
) -> Iterator[Result]:
    """Yield `function(item)` for every item as it is done, in any order.

    Args:
        function: a function of a module (workers are spawned and import it); long ones may call `advance`.
        processes: 1 or less runs everything in this process.
        title: the progress bar's text.
        few: so many items or fewer are done in this process, whatever `processes` says.
        setup: called once in each process with `setup_arguments` before its first item.
    """
    bar = progress_bar(title, len(items), "case")
    used = min(processes, len(items)) if len(items) > few else 1
    with bar:
        if used <= 1:
            yield from _here(function, items, bar, setup, setup_arguments)
        else:
            yield from _in_processes(function, items, bar, used, setup, setup_arguments)


def _here(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    bar: tqdm[Any],
    setup: Callable[..., None] | None,
    arguments: tuple[Any, ...],
) -> Iterator[Result]:
    done = [0.0]

    def add(share: float) -> None:
        done[0] += share
        show(bar, done[0])

    _METER[0] = _Meter(add)
    if setup is not None and items:
        setup(*arguments)
    for item in items:
        yield _work(function, item)


def show(bar: tqdm[Any], done: float) -> None:
    """Set a bar to a number of items, the last of which may be done in part."""
    shown = round(done, 2)
    bar.n = int(shown) if shown.is_integer() else shown  # "3/11" rather than "3.0/11"
    bar.update(0)


def _work(function: Callable[[Item], Result], item: Item) -> Result:
    if _stopped():
        raise CancelledError
    result = function(item)
    _METER[0].end_item()
    return result


def _in_processes(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    bar: tqdm[Any],
    processes: int,
    setup: Callable[..., None] | None,
    arguments: tuple[Any, ...],
) -> Iterator[Result]:
    threads = max(1, default_processes() // processes)
    context = multiprocessing.get_context("spawn")
    done = context.Value("d", 0.0)
    stop = context.Value("b", 0)
    start = (threads, done, stop, setup, arguments)
    pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_start_worker, initargs=start)
    try:
        with _interrupts_held():
            waiting: set[Future[Result]] = {pool.submit(_work, function, item) for item in items}
        while waiting:
            ended, waiting = wait(waiting, _LOOK_SECONDS, FIRST_COMPLETED)
            show(bar, done.value)
            yield from (future.result() for future in ended)
    except BrokenProcessPool as error:
        # The system's own way to say that memory is used up is to kill a process.
        raise OneShotError(
            f"expected {processes} processes to last, found one ended by the system, most often for lack of memory; "
            "lower -np, or -sam2_batch of sam2; what is done is kept, and the same command goes on from there"
        ) from error
    finally:
        # After an interruption the cases that have not begun are dropped; those under way are whole or absent.
        stop.value = 1
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Ctrl-C waits meanwhile, and processes started here hold it back until `_start_worker` ignores it."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _add_to(done: Any, share: float) -> None:
    with done.get_lock():
        done.value += share


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for its next case for ever, or write beside the run that resumes."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _stopped() -> bool:
    """Whether the parent has ended early: what is handed over and has not begun is dropped."""
    return _STOP[0] is not None and bool(_STOP[0].value)


def _start_worker(
    threads: int, done: Any, stop: Any, setup: Callable[..., None] | None, arguments: tuple[Any, ...]
) -> None:
    # Ctrl-C reaches the whole process group; the parent alone decides what then happens.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _STOP[0] = stop
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _METER[0] = _Meter(partial(_add_to, done))
    # For libraries that load later, and for torch where the setup's own imports have brought it already; importing it
    # here would cost every worker seconds that label arithmetic does not need.
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)
    if setup is not None and not _stopped():
        setup(*arguments)
