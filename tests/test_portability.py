"""What would trip over Windows or macOS, found by reading the code, since neither is at hand to run it."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("nnunet_oneshot", "sam2_propagation", "trainers")
NOT_FILES_OF_TEXT = ("blosc2", "webbrowser", "os", "archive")
"""What else has a method `open`."""
POSIX = ("fork", "forkpty", "killpg", "SIGKILL", "setsid", "getuid", "geteuid", "sched_getaffinity", "fchmod", "mkfifo")
POSIX_MODULES = ("fcntl", "resource", "pwd", "grp", "termios")
Find = Callable[[ast.Module], Iterator[int]]


def text_without_encoding(tree: ast.Module) -> Iterator[int]:
    """Lines where text is read or written as the system likes: on Windows that is not UTF-8."""
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        if "encoding" not in given and (_is_text_file(call, given) or _is_text_process(given)):
            yield call.lineno


def _is_text_file(call: ast.Call, given: dict[str | None, ast.expr]) -> bool:
    owner = call.func.value if isinstance(call.func, ast.Attribute) else None
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if name in ("read_text", "write_text"):
        return True
    if name != "open" or getattr(owner, "id", None) in NOT_FILES_OF_TEXT:
        return False
    return not _is_binary(call, given)


def _is_binary(call: ast.Call, given: dict[str | None, ast.expr]) -> bool:
    """Whether a mode says so, or either side of one that is chosen by a condition."""
    asked = [node for node in (*call.args, given.get("mode")) if node is not None]
    return any("b" in mode for node in asked for mode in _modes(node))


def _modes(node: ast.expr) -> list[str]:
    if isinstance(node, ast.IfExp):
        return [*_modes(node.body), *_modes(node.orelse)]
    return [node.value] if isinstance(node, ast.Constant) and isinstance(node.value, str) else []


def bytes_with_encoding(tree: ast.Module) -> Iterator[int]:
    """Lines where a file of bytes is opened with an encoding, which Python refuses."""
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        if name == "open" and "encoding" in given and _is_binary(call, given):
            yield call.lineno


def _is_text_process(given: dict[str | None, ast.expr]) -> bool:
    asked = [given.get("text"), given.get("universal_newlines")]
    return any(isinstance(value, ast.Constant) and value.value for value in asked)


def posix_alone(tree: ast.Module) -> Iterator[int]:
    """Lines that use what Windows lacks without asking first whether it is there."""
    guarded = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If | ast.IfExp) and "hasattr(os" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in POSIX and id(node) not in guarded:
            yield node.lineno
        if isinstance(node, ast.Import) and any(alias.name in POSIX_MODULES for alias in node.names):
            yield node.lineno


def workers_that_are_not_spawned(tree: ast.Module) -> Iterator[int]:
    """Lines that start processes in the system's own way: forked ones inherit locks, and exist on Linux alone."""
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        text = ast.unparse(call)
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        pooled = name == "ProcessPoolExecutor" and "mp_context=" not in text
        asked = name in ("get_context", "set_start_method") and "'spawn'" not in text
        if pooled or asked or text.startswith(("multiprocessing.Pool(", "multiprocessing.Process(")):
            yield call.lineno


TEXT_RULES: tuple[Find, ...] = (text_without_encoding, bytes_with_encoding)
RULES: tuple[Find, ...] = (*TEXT_RULES, posix_alone, workers_that_are_not_spawned)


@pytest.mark.parametrize("find", RULES, ids=lambda rule: rule.__name__)
def test_nothing_of_one_system_alone(find: Find) -> None:
    # Benchmarks measure processes as Linux tells of them; their texts are read anywhere.
    places = (*PACKAGES, "benchmarks") if find in TEXT_RULES else PACKAGES
    files = [file for place in places for file in sorted((ROOT / place).rglob("*.py"))]
    assert len(files) > 50
    found = [
        f"{file.relative_to(ROOT)}:{line}"
        for file in files
        for line in find(ast.parse(file.read_text(encoding="utf-8")))
    ]
    assert found == []


@pytest.mark.parametrize(
    ("find", "code", "caught"),
    [
        (text_without_encoding, "p.read_text()", True),
        (text_without_encoding, "open(p, 'a')", True),
        (text_without_encoding, "subprocess.run(['x'], text=True)", True),
        (text_without_encoding, "p.open('rb'); p.write_text('', encoding='utf-8'); webbrowser.open(p)", False),
        (text_without_encoding, "p.open('ab' if x else 'wb')", False),
        (text_without_encoding, "p.open('a' if x else 'w')", True),
        (bytes_with_encoding, "p.open('ab' if x else 'wb', encoding='utf-8')", True),
        (bytes_with_encoding, "p.open('rb'); p.open('a' if x else 'w', encoding='utf-8')", False),
        (posix_alone, "os.killpg(1, signal.SIGKILL)", True),
        (posix_alone, "import fcntl", True),
        (posix_alone, "if hasattr(os, 'killpg'):\n    os.killpg(1, signal.SIGKILL)", False),
        (workers_that_are_not_spawned, "ProcessPoolExecutor(2)", True),
        (workers_that_are_not_spawned, "multiprocessing.get_context('fork')", True),
        (workers_that_are_not_spawned, "ProcessPoolExecutor(2, mp_context=get_context('spawn'))", False),
    ],
)
def test_the_rules_see_what_they_should(find: Find, code: str, caught: bool) -> None:
    assert bool(list(find(ast.parse(code)))) is caught
