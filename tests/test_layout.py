"""The shape of the package: imports run one way, and no file grows beyond what one can read."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import networkx as nx

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "eecompile"
MOST_LINES = 400

# From the ground up; a file may import from its own layer and from those above it in this list.
LAYERS = [
    {"errors", "measuring"},
    {"kernels", "ops"},
    {"signature", "criteria", "heads", "gates", "routers", "strategies", "route_records"}
    | {"reasons", "records", "program", "prediction", "thresholds"},
    {"capture"},
    {"passes"},
    {"runtime", "costs"},
    {"training", "calibration"},
    {
        "module",
        "device_programs",
        "decisions",
        "routing",
        "held",
        "trainable",
        "api",
        "members",
        "artifact",
        "anytime",
        "benchmark",
        "explain",
    },
    {"inspect"},
    {"__init__"},  # the package's front: names of every layer, each imported when it is first asked for
    {"cli", "__main__"},
]
RANK = {unit: i for i, layer in enumerate(LAYERS) for unit in layer}
FRONT = "__init__"
# Longer than the rule allows; a file that has been split must go from here.
TOO_LONG: set[str] = set()

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


@functools.cache
def imports(path: Path) -> list[tuple[str, int, bool]]:
    """Modules of this package that a file imports: name, line, and whether it happens when the file is imported."""
    seen = []
    todo: list[tuple[ast.AST, bool]] = [(tree_of(path), True)]
    while todo:
        node, at_once = todo.pop()
        at_once = at_once and not isinstance(node, ast.FunctionDef | ast.Lambda)
        todo += [(child, at_once) for child in ast.iter_child_nodes(node)]
        found: list[str] = []
        if isinstance(node, ast.Import):
            found = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found = [f"{node.module}.{a.name}" if f"{node.module}.{a.name}" in KNOWN else node.module for a in node.names]
        seen += [(name, node.lineno, at_once) for name in found if name.partition(".")[0] == "eecompile"]
    return seen


def test_every_part_of_the_package_has_a_layer() -> None:
    assert {unit_of(module_of(f)) for f in FILES} == set(RANK), "name it in LAYERS, as low as its imports allow"


def test_imports_run_one_way() -> None:
    """Imports inside functions count as well: they hide a wrong direction, they do not mend it."""
    wrong = [
        f"{path.relative_to(ROOT)}:{at} imports {name}"
        for path in FILES
        for name, at, _ in imports(path)
        if RANK[unit_of(name)] > RANK[unit_of(module_of(path))] and unit_of(module_of(path)) != FRONT
    ]
    assert wrong == []


def test_no_two_files_need_each_other() -> None:
    graph = nx.DiGraph()
    for path in FILES:
        graph.add_edges_from((module_of(path), name) for name, _, at_once in imports(path) if at_once and name in KNOWN)
    tangled = [sorted(c) for c in nx.strongly_connected_components(graph) if len(c) > 1]
    assert tangled == []


def test_no_file_has_more_lines_than_one_can_read() -> None:
    files = [p for folder in ("eecompile", "examples", "tests") for p in (ROOT / folder).rglob("*.py")]
    counts = {str(p.relative_to(ROOT)): len(p.read_text(encoding="utf-8").splitlines()) for p in files}
    assert {name for name, count in counts.items() if count > MOST_LINES} == TOO_LONG


def test_every_file_says_which_question_it_answers() -> None:
    silent = [str(p.relative_to(ROOT)) for p in FILES if tree_of(p).body and not ast.get_docstring(tree_of(p))]
    assert silent == []


def test_triton_is_imported_by_the_kernels_alone() -> None:
    users = set()
    for path in FILES:
        for node in ast.walk(tree_of(path)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(n.partition(".")[0] == "triton" for n in names):
                users.add(unit_of(module_of(path)))
    assert users <= {"kernels"}
