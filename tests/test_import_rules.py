"""The rules of the layout: who may import whom, found by reading the code, not by running it."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("nnunet_oneshot", "sam2_propagation", "trainers")
OURS = (*PACKAGES, "oneshot_trainer", "oneshot_trainer_variants")
TRAINER_FILES = {"trainers.oneshot_trainer", "trainers.oneshot_trainer_variants"}
TRAINERS = ("trainers", "oneshot_trainer", "oneshot_trainer_variants")

FOR_TRAINERS = {f"nnunet_oneshot.{name}" for name in ("losses", "cross_patch", "settings", "errors")} | {
    f"nnunet_oneshot.{name}"
    for name in (
        "case_selection",
        "training_views",
        "training_cases",
        "filled_labels",
        "next_stage",
        "model_checkpoints",
        "bfloat16",
    )
}
"""What the design names, and the modules that hold what did not fit into those."""
BELOW_TRAINERS = FOR_TRAINERS | {"sam2_propagation.errors", "nnunet_oneshot.parallel", "nnunet_oneshot.file_hash"}
EXTRAS = ("matplotlib", "pydicom")
"""Third parties that may be imported inside a function, since an extra brings them."""
STAGES = {
    f"nnunet_oneshot.{name}"
    for name in ("suggest", "propagate", "consensus", "relabel", "refine", "evaluate", "report", "review", "export")
}
IMPORTED_LATE = {f"nnunet_oneshot.{name}" for name in ("cli", "command_line")}
CALL_SEVERAL = {f"nnunet_oneshot.{name}" for name in ("cli", "refine", "run", "demo", "summary")}
PAIRS = {
    ("nnunet_oneshot.propagate", "nnunet_oneshot.consensus"),
    ("nnunet_oneshot.report", "nnunet_oneshot.evaluate"),
}
"""`propagate` ends in the function that fuses; a report shows scores where true labels are given."""
MAKE_LABELS = {f"nnunet_oneshot.{name}" for name in ("propagate", "consensus", "relabel", "refine")} | {
    "sam2_propagation"
}
READ_TRUTH = {f"nnunet_oneshot.{name}" for name in ("evaluate", "metrics", "phantom")}


@dataclass(frozen=True)
class Import:
    """`module` imports `target`; `inside` names the function where that happens, if it does in one."""

    module: str
    target: str
    inside: str | None = None


def find_imports(root: Path) -> list[Import]:
    """Imports of our own modules, and of any inside functions, of every module in our packages' folders."""
    files = {_name(root, f): f for package in PACKAGES for f in sorted((root / package).rglob("*.py"))}
    return [found for name, file in files.items() for found in _imports(name, file, set(files))]


def _name(root: Path, file: Path) -> str:
    parts = file.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(name: str, file: Path, known: set[str]) -> Iterator[Import]:
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    for node, function in _with_function(ast.parse(file.read_text()), None):
        for target in _targets(node, package, known):
            if target.split(".")[0] in OURS or (function and target.split(".")[0] not in EXTRAS):
                yield Import(name, target, function)


def _with_function(node: ast.AST, function: str | None) -> Iterator[tuple[ast.AST, str | None]]:
    for child in ast.iter_child_nodes(node):
        yield child, function
        inner = child.name if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) else function
        yield from _with_function(child, "lambda" if isinstance(child, ast.Lambda) else inner)


def _targets(node: ast.AST, package: str, known: set[str]) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
        base = ".".join([*above, *([node.module] if node.module else [])])
        # `from package import module` imports the module, `from module import name` the module before it.
        yield from {f"{base}.{a.name}" if f"{base}.{a.name}" in known else base for a in node.names}
    elif isinstance(node, ast.Call) and _is_import_module(node.func):
        argument = node.args[0] if node.args else None
        if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
            yield argument.value


def _is_import_module(function: ast.expr) -> bool:
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    return name in ("import_module", "__import__")


def graph_of(imports: Iterable[Import]) -> dict[str, set[str]]:
    graph: dict[str, set[str]] = {}
    for found in imports:
        graph.setdefault(found.module, set()).add(found.target)
    return graph


def reachable(graph: Mapping[str, set[str]], start: str) -> set[str]:
    """All modules that importing `start` imports."""
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        for target in graph.get(waiting.pop(), set()) - seen:
            seen.add(target)
            waiting.append(target)
    return seen


def below(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def propagation_that_knows_us(imports: Iterable[Import]) -> list[Import]:
    ours = [i for i in imports if i.target.split(".")[0] in OURS]
    return [i for i in ours if below(i.module, "sam2_propagation") and not below(i.target, "sam2_propagation")]


def trainers_that_know_more(imports: Iterable[Import]) -> list[tuple[str, str]]:
    graph = graph_of(i for i in imports if i.target.split(".")[0] in OURS)
    known = {m: to if m in TRAINER_FILES else reachable(graph, m) for m, to in graph.items()}
    allowed = {m: FOR_TRAINERS | set(TRAINERS) if m in TRAINER_FILES else BELOW_TRAINERS for m in known}
    read = {m for m in known if m in TRAINER_FILES | FOR_TRAINERS}
    return [(m, target) for m in sorted(read) for target in sorted(known[m] - allowed[m])]


def imports_of_trainers(imports: Iterable[Import]) -> list[Import]:
    return [i for i in imports if below(i.target, *TRAINERS) and not below(i.module, *TRAINERS)]


def imports_in_functions(imports: Iterable[Import]) -> list[Import]:
    return [i for i in imports if i.inside and i.module not in IMPORTED_LATE]


def cycles(imports: Iterable[Import]) -> list[str]:
    graph = graph_of(i for i in imports if i.module != i.target)
    return sorted(module for module in graph if module in reachable(graph, module))


def label_makers_that_reach_truth(imports: Iterable[Import]) -> list[tuple[str, str]]:
    graph = graph_of(imports)
    makers = [module for module in graph if below(module, *MAKE_LABELS)]
    return [(maker, truth) for maker in makers for truth in sorted(READ_TRUTH & reachable(graph, maker))]


def callers_of_several_stages(imports: Iterable[Import]) -> list[str]:
    graph = graph_of(i for i in imports if (i.module, i.target) not in PAIRS)
    limit = {module: 0 if module in STAGES else 1 for module in graph}
    return sorted(m for m, to in graph.items() if m not in CALL_SEVERAL and len(to & STAGES - {m}) > limit[m])


RULES = {
    "sam2_propagation imports nothing of ours": propagation_that_knows_us,
    "trainers import only losses, cross_patch, settings and errors": trainers_that_know_more,
    "nothing imports trainers": imports_of_trainers,
    "no imports inside functions": imports_in_functions,
    "no import cycles": cycles,
    "nothing that makes labels reaches what reads truth": label_makers_that_reach_truth,
    "only cli, refine, run, demo and summary call several stages": callers_of_several_stages,
}


@pytest.fixture(scope="module")
def imports() -> list[Import]:
    return find_imports(ROOT)


@pytest.mark.parametrize("rule", RULES)
def test_rule(imports: list[Import], rule: str) -> None:
    assert RULES[rule](imports) == []


def test_the_walker_sees_this_package(imports: list[Import]) -> None:
    assert Import("nnunet_oneshot.propagate", "nnunet_oneshot.consensus") in imports
    assert Import("nnunet_oneshot.refine", "nnunet_oneshot.nnunet") in imports, "from package import module"


def write_tree(root: Path, files: Mapping[str, str]) -> list[Import]:
    for name, code in files.items():
        file = root / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(code)
    return find_imports(root)


BAD: dict[str, tuple[str, dict[str, str]]] = {
    "propagation imports a stage": (
        "sam2_propagation imports nothing of ours",
        {"sam2_propagation/deep/x": "from nnunet_oneshot.store import Store"},
    ),
    "propagation imports trainers": (
        "sam2_propagation imports nothing of ours",
        {"sam2_propagation/x": "import trainers.oneshot_trainer"},
    ),
    "trainer imports the store": (
        "trainers import only losses, cross_patch, settings and errors",
        {"trainers/oneshot_trainer": "from nnunet_oneshot import store", "nnunet_oneshot/store": ""},
    ),
    "a module for trainers imports the store": (
        "trainers import only losses, cross_patch, settings and errors",
        {"nnunet_oneshot/losses": "from nnunet_oneshot.x import y", "nnunet_oneshot/x": "import nnunet_oneshot.store"},
    ),
    "stage imports a trainer": (
        "nothing imports trainers",
        {"nnunet_oneshot/refine": "from oneshot_trainer import OneShotTrainer"},
    ),
    "import in a function": (
        "no imports inside functions",
        {"nnunet_oneshot/x": "class A:\n    def f(self):\n        if 1:\n            import nnunet_oneshot.y"},
    ),
    "third party in a function": (
        "no imports inside functions",
        {"sam2_propagation/x": "def f():\n    from scipy import ndimage"},
    ),
    "import_module in a function": (
        "no imports inside functions",
        {"nnunet_oneshot/x": "def f():\n    return importlib.import_module('nnunet_oneshot.y')"},
    ),
    "cycle of three": (
        "no import cycles",
        {
            "nnunet_oneshot/a": "from nnunet_oneshot import b",
            "nnunet_oneshot/b": "from .c import thing",
            "nnunet_oneshot/c": "import nnunet_oneshot.a",
        },
    ),
    "relabel reaches evaluate through another module": (
        "nothing that makes labels reaches what reads truth",
        {
            "nnunet_oneshot/relabel": "from nnunet_oneshot import helper",
            "nnunet_oneshot/helper": "from nnunet_oneshot.evaluate import evaluate",
            "nnunet_oneshot/evaluate": "",
        },
    ),
    "a helper calls two stages": (
        "only cli, refine, run, demo and summary call several stages",
        {
            "nnunet_oneshot/x": "from nnunet_oneshot import propagate, evaluate",
            "nnunet_oneshot/propagate": "",
            "nnunet_oneshot/evaluate": "",
        },
    ),
    "a stage calls another": (
        "only cli, refine, run, demo and summary call several stages",
        {"nnunet_oneshot/report": "from nnunet_oneshot.relabel import relabel", "nnunet_oneshot/relabel": ""},
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_broken_rule_is_found(tmp_path: Path, name: str) -> None:
    rule, files = BAD[name]
    assert RULES[rule](write_tree(tmp_path, files)) != []


def test_what_is_allowed_is_not_found(tmp_path: Path) -> None:
    found = write_tree(
        tmp_path,
        {
            "nnunet_oneshot/cli": "def f():\n    import nnunet_oneshot.run",
            "nnunet_oneshot/run": "from nnunet_oneshot import evaluate, propagate",
            "nnunet_oneshot/propagate": "from nnunet_oneshot.consensus import build",
            "nnunet_oneshot/consensus": "import numpy",
            "nnunet_oneshot/evaluate": "def f():\n    import matplotlib",
            "trainers/oneshot_trainer": "from nnunet_oneshot.settings import PRESETS",
            "trainers/oneshot_trainer_variants": "from oneshot_trainer import OneShotTrainer",
        },
    )
    assert found
    assert [rule for rule, check in RULES.items() if check(found)] == []
