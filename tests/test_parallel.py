"""One function over many cases: here or in workers, errors as they are, nothing begun after a failure."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nnunet_oneshot.errors import OneShotError
from nnunet_oneshot.nnunet_process import Progress
from nnunet_oneshot.parallel import advance, default_processes, over_cases

_STATE: dict[str, int] = {}


def set_up(value: int) -> None:
    _STATE.update(value=value, calls=_STATE.get("calls", 0) + 1)


def add(item: int) -> tuple[int, int]:
    return item + _STATE["value"], os.getpid()


def refuse_the_first(item: tuple[int, Path]) -> None:
    index, folder = item
    if index == 0:
        raise OneShotError("expected another item, found 0; take it out")
    time.sleep(0.2)
    (folder / str(index)).touch()


@pytest.mark.parametrize("processes", [1, 2])
def test_every_item_once_and_set_up_before(processes: int) -> None:
    _STATE.clear()
    results = list(over_cases(add, [1, 2, 3, 4], processes=processes, title="", setup=set_up, setup_arguments=(10,)))
    assert sorted(value for value, _ in results) == [11, 12, 13, 14]
    assert (os.getpid() in {process for _, process in results}) == (processes == 1)
    assert _STATE.get("calls", 0) == (processes == 1), "once, in this process only where it does the work"


def half_way(item: int) -> None:
    advance(0.25)
    advance(0.25)
    time.sleep(3)
    advance(3.0)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_the_bar_moves_within_an_item_and_ends_whole(
    processes: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    list(over_cases(half_way, [1, 2], processes=processes, title="long"))
    shown = capsys.readouterr().err
    assert "0.5/2" in shown or "1/2" in shown, "both half done, or the first"
    assert "100%" in shown.rsplit("\r", 1)[-1]


SLOW_TO_IMPORT = """
import multiprocessing
import time
from pathlib import Path

if multiprocessing.current_process().name != "MainProcess":
    Path(f"{multiprocessing.current_process().name}.starting").touch()
    time.sleep(1)


def work(item):
    Path(f"{item}.done").touch()
"""
INTERRUPTED = """
import signal

from slow_to_import import work

from nnunet_oneshot.parallel import over_cases

if __name__ == "__main__":
    # Where tests run in the background of a shell, it would be ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        list(over_cases(work, range(9), processes=2, title=""))
    except KeyboardInterrupt:
        print("interrupted")
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="sends signals to a process group")
def test_ctrl_c_while_workers_start_is_told_by_the_parent_alone(tmp_path: Path) -> None:
    for name, code in (("slow_to_import", SLOW_TO_IMPORT), ("interrupted", INTERRUPTED)):
        (tmp_path / f"{name}.py").write_text(code, encoding="utf-8")
    with subprocess.Popen(
        [sys.executable, "interrupted.py"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        start_new_session=True,
    ) as driver:
        while driver.poll() is None and len(list(tmp_path.glob("*.starting"))) < 2:
            time.sleep(0.01)
        os.killpg(driver.pid, signal.SIGINT)
        out, err = driver.communicate(timeout=60)
    assert (driver.returncode, out) == (0, "interrupted\n"), err
    assert "Traceback" not in err
    assert not list(tmp_path.glob("*.done")), "what has not begun is dropped"


def die(item: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_the_system_kills_is_said() -> None:
    """What a machine does that is out of memory."""
    with pytest.raises(OneShotError, match="lack of memory; lower -np"):
        list(over_cases(die, [1, 2], processes=2, title=""))


@pytest.mark.slow
def test_a_log_gets_the_end_and_not_every_step(capsys: pytest.CaptureFixture[str]) -> None:
    list(over_cases(half_way, [1], processes=1, title="long"))
    shown = capsys.readouterr().err.strip().split("\r")
    assert len(shown) <= 3
    assert "1/1" in shown[-1]


def test_a_log_tells_of_a_training_too(capsys: pytest.CaptureFixture[str]) -> None:
    """Polled several times a second for hours: neither silence nor a line each time."""
    epochs = iter([*range(100), 100, 100])
    with Progress("train fold all", 100, lambda: next(epochs)) as bar:
        for _ in range(101):
            bar.update()
    shown = capsys.readouterr().err.strip().split("\r")
    assert "train fold all" in shown[0]
    assert len(shown) <= 3
    assert "100/100" in shown[-1]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_users_mistake_comes_out_as_one_and_waiting_items_are_dropped(tmp_path: Path, processes: int) -> None:
    items = [(index, tmp_path) for index in range(40)]
    with pytest.raises(OneShotError, match="expected another item, found 0"):
        list(over_cases(refuse_the_first, items, processes=processes, title=""))
    assert len(list(tmp_path.iterdir())) < 39


def test_nothing_to_do_needs_no_set_up() -> None:
    assert list(over_cases(add, [], processes=4, title="", setup=refuse_the_first, setup_arguments=((0, None),))) == []


def test_one_item_needs_no_worker() -> None:
    _STATE["value"] = 0
    assert list(over_cases(add, [5], processes=8, title="")) == [(5, os.getpid())]


@pytest.mark.parametrize(("items", "here"), [(3, True), (4, False)])
def test_a_few_items_that_are_soon_done_need_no_worker(items: int, here: bool) -> None:
    done = list(over_cases(add, range(items), processes=2, title="", few=3, setup=set_up, setup_arguments=(10,)))
    assert {process == os.getpid() for _, process in done} == {here}


def test_workers_that_make_labels_of_labels_load_no_torch() -> None:
    """Each of them would load it anew, for nothing."""
    modules = ", ".join(f"nnunet_oneshot.{name}" for name in ("consensus", "first_round", "refine_changes", "relabel"))
    code = f"import sys, {modules}, nnunet_oneshot.rounds; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_default_processes_is_a_count() -> None:
    assert default_processes() >= 1
