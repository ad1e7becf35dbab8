"""The shape of the package: imports run one way, without circles, and functions stay small enough to read."""

from __future__ import annotations

import ast
import functools
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import networkx as nx
import pytest
from torch import nn

from eecompile import CompiledModule, Result
from eecompile.program import Program

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "eecompile"

# From the ground up; a file may import from its own layer and from those above it in this list.
LAYERS = [
    {"errors", "measuring", "guards", "constants", "binomial", "containers", "plain", "writing", "translating", "onnx"},
    {"ir", "criteria"},
    {"kernels", "ops"},
    {"untrained"},
    {"signature", "heads", "gates", "routers", "reasons", "program", "prediction"},
    {"capture"},
    {"passes"},
    {"runtime", "costs", "own_trunk"},
    {"result", "public_records", "anytime", "wrapping"},
    {"training", "calibration", "export", "report", "serving", "benchmark", "explain", "with_labels"},
    {"strategies"},
    {"module", "api", "options", "members", "artifact", "language"},
    {"inspect"},
    {"__init__"},  # the package's front: names of every layer, each imported when it is first asked for
    {"advice"},
    {"cli", "__main__"},
]
RANK = {unit: i for i, layer in enumerate(LAYERS) for unit in layer}
FRONT = "__init__"

FILES = sorted(PACKAGE.rglob("*.py"))


def unit_of(module: str) -> str:
    """`passes` for `eecompile.passes.stage`."""
    return module.split(".")[1] if "." in module else FRONT


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


KNOWN = {module_of(f) for f in FILES} | {"eecompile.kernels"}


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


# A function that takes the compiled module says so by a type that is imported for the type checker alone.
TYPE = "eecompile.module"


def for_types(node: ast.AST) -> bool:
    """Whether a node is `if TYPE_CHECKING:` with the import of the compiled module's type and nothing else."""
    if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
        return False
    return [ast.unparse(n) for n in node.body] == [f"from {TYPE} import CompiledModule"]


@functools.cache
def imports(path: Path) -> list[tuple[str, int]]:
    """Modules of this package that a file imports, within functions too: name and line."""
    seen = []
    todo: list[ast.AST] = [tree_of(path)]
    while todo:
        node = todo.pop()
        if for_types(node):
            continue
        todo += ast.iter_child_nodes(node)
        found: list[str] = []
        if isinstance(node, ast.Import):
            found = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found = [f"{node.module}.{a.name}" if f"{node.module}.{a.name}" in KNOWN else node.module for a in node.names]
        seen += [(name, node.lineno) for name in found if name.partition(".")[0] == "eecompile"]
    return seen


def test_every_part_of_the_package_has_a_layer() -> None:
    assert {unit_of(module_of(f)) for f in FILES} == set(RANK), "name it in LAYERS, as low as its imports allow"


def test_imports_run_one_way() -> None:
    """Imports inside functions count as well: they hide a wrong direction, they do not mend it."""
    wrong = [
        f"{path.relative_to(ROOT)}:{at} imports {name}"
        for path in FILES
        for name, at in imports(path)
        if RANK[unit_of(name)] > RANK[unit_of(module_of(path))] and unit_of(module_of(path)) != FRONT
    ]
    assert wrong == []


def circles(of: Callable[[str], str]) -> list[list[str]]:
    """Groups of files, or of parts, that import one another, within functions too."""
    graph = nx.DiGraph()
    for path in FILES:
        if module_of(path) == "eecompile":
            continue
        for name, _ in imports(path):
            if name in KNOWN and name != "eecompile" and of(name) != of(module_of(path)):
                graph.add_edge(of(module_of(path)), of(name))
    return sorted(sorted(c) for c in nx.strongly_connected_components(graph) if len(c) > 1)


def test_strategies_are_recipes() -> None:
    """Over the records and units that they name; what lies below the compiled module does not know them."""
    used = {unit_of(name) for path in FILES if unit_of(module_of(path)) == "strategies" for name, _ in imports(path)}
    assert used - {"strategies"} == {"criteria", "errors", "heads", "ir", "kernels", "plain"}


def test_no_two_files_need_each_other() -> None:
    assert circles(str) == []


def test_no_two_parts_need_each_other() -> None:
    """Among the parts of one layer too: those of the compiled module are the exception."""
    assert [c for c in circles(unit_of) if not set(c) <= LAYERS[RANK["module"]]] == []


def test_ruffs_exceptions_are_needed() -> None:
    """A file that has no function too long or too complex any more must go from the list in pyproject.toml."""
    tomllib = pytest.importorskip("tomllib")
    lint = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["ruff"]["lint"]
    listed = {
        (path, rule) for path, rules in lint["per-file-ignores"].items() for rule in rules if path.startswith("eecompile")
    }
    most = [
        f"lint.mccabe.max-complexity={lint['mccabe']['max-complexity']}",
        f"lint.pylint.max-args={lint['pylint']['max-args']}",
    ]
    command = [sys.executable, "-m", "ruff", "check", "eecompile", "--isolated", "--no-cache", "--select", "C901,PLR0913"]
    command += [part for option in most for part in ("--config", option)] + ["--output-format", "json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    found = {(str(Path(f["filename"]).relative_to(ROOT)), f["code"]) for f in json.loads(done.stdout)}
    assert listed == found


def test_every_file_says_which_question_it_answers() -> None:
    silent = [str(p.relative_to(ROOT)) for p in FILES if tree_of(p).body and not ast.get_docstring(tree_of(p))]
    assert silent == []


# The records of one kind of choice. What places and writes them, strategies and what shows them know which kind they have,
# as do the records and results that users read by kind; all others, lowering, executors and costs first of all, read
# `program.choices` as choices, deciders and charges.
KINDS = {"Carry", "Gate", "HaltStep", "Route", "Way", "Width"}
FIELDS = {"gates", "widths", "route", "gate_recipes", "halt_recipes", "route_recipe"}
MAY_KNOW_KINDS = ("inspect.", "strategies.", "passes.place_", "passes.insert_")
KNOW_KINDS = {"ir.choices", "public_records", "result"}


def names_a_kind(node: ast.AST) -> bool:
    """An import of a record, or `...choices.gates` and its like."""
    if isinstance(node, ast.ImportFrom):
        return bool(KINDS & {a.name for a in node.names})
    if not (isinstance(node, ast.Attribute) and node.attr in FIELDS):
        return False
    whole = ast.unparse(node.value)
    return (whole.endswith("choices") and whole != "self.choices") or whole.startswith("_choices(")


def test_few_files_know_kinds_of_choices() -> None:
    names = {module_of(p).removeprefix("eecompile."): p for p in FILES}
    found = {n for n, p in names.items() if any(map(names_a_kind, ast.walk(tree_of(p))))}
    assert {n for n in found if not n.startswith(MAY_KNOW_KINDS)} == KNOW_KINDS


def test_triton_is_imported_by_the_kernels_alone() -> None:
    users = set()
    for path in FILES:
        for node in ast.walk(tree_of(path)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(n.partition(".")[0] == "triton" for n in names):
                users.add(unit_of(module_of(path)))
    assert users <= {"kernels"}


def test_the_compiled_module_its_program_and_its_result_stay_small() -> None:
    """One `nn.Module` that holds what it needs, a program and a result that a person can take in."""
    assert CompiledModule.__bases__ == (nn.Module,)
    assert len(fields(Result)) <= 8
    assert len(fields(Program)) <= 14
