"""Every format at every level: what it must say, that it is valid, and that it fits."""

from __future__ import annotations

import ast
import io
import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from rich.console import Console

from eecompile import CompiledModule, EecompileError
from eecompile.inspect import FORMATS, levels, outline, render, to_dict, to_text
from tests.inspect.conftest import images, resnet
from tests.support import compiled as eecompile

BLOCKS = {
    "conv": [f"layer{i}.{j}" for i in (1, 2, 3) for j in (0, 1)],
    "bert": [f"bert.encoder.layer.{i}" for i in range(8)],
}


def blocks_of(fast: CompiledModule) -> list[str]:
    return BLOCKS["bert" if "Bert" in repr(fast) else "conv"]


def test_a_result_prints_as_a_line_without_empty_fields(conv: CompiledModule) -> None:
    x = images(5)
    shown = repr(conv.run(x))
    assert re.fullmatch(
        r"Result\(rows=5, exit_index=\{.*\}, mean_cost=[\d.]+, mean_confidence=[\d.]+, output=float32\[5, \d+\]\)", shown
    )
    assert "trace=['outputs', 'confidences']" in repr(conv.observe(x))


def test_levels_are_those_of_the_history(fast: CompiledModule) -> None:
    names = [s.name for s in fast.history]
    assert levels(fast) == ["source", *names, "marked", "staged"]
    assert {"find_cuts", "insert_exits", "stage", "verify"} < set(names)


def test_every_format_says_something_at_every_level(fast: CompiledModule) -> None:
    for after in [None, *levels(fast)]:
        for format in FORMATS:
            text = to_text(fast, format, after)
            lines = text.splitlines()
            assert len(lines) >= 1, (format, after)
            if format in ("tree", "table") and after is not None:
                assert f"{after}: " in text, (format, after)


@pytest.mark.parametrize("after", ["source", "find_blocks", "marked", "staged"])
def test_every_block_is_there_with_its_share_at_every_level(fast: CompiledModule, after: str) -> None:
    found = [(r.name, r.share) for _, _, r in outline(fast, after, collapse=False).regions() if r.kind]
    assert [name for name, _ in found] == blocks_of(fast)
    shares = {b.name: b.flops / fast.program.total_flops for b in fast.program.structure.blocks}
    assert found == [(name, pytest.approx(shares[name])) for name in shares]
    whole = sum(p.share for p in outline(fast, after).parts)
    assert whole == pytest.approx(1.0, abs=0.02)


def test_the_tree_names_blocks_exits_survivors_refusals_passes(conv: CompiledModule) -> None:
    text = str(conv)
    assert text == to_text(conv)
    assert text.startswith("ResNet, branchy: 3 exits")
    for e in conv.exits:
        assert f"{e.name} after {e.cut}" in text
    for s in conv.program.stages[:-1]:
        for v in s.outputs:
            assert f"survives {v.node}: {v.dtype}[batch, " in text
    condition = "entropy <= 0.9657 (1 - entropy / log 5 as confidence >= 0.4)"
    assert f"exit_0 after layer1.0: open, exits at {condition}" in text
    assert text.count("closed: neither head nor decision runs") == 1
    costs = conv.costs([True, False, True]).tolist()
    assert f"a row that exits here costs {100 * costs[0]:.1f}%" in text
    assert f"costs {100 * costs[1]:.1f}%" not in text
    assert "executor compact, backend eager" in text
    assert conv.program.refusals
    assert conv.program.refusals[0].reason in text
    for s in conv.history:
        assert s.name in text


def test_long_runs_of_alike_blocks_are_one_line(bert: CompiledModule) -> None:
    text = to_text(bert)
    assert "bert.encoder.layer.3 ... 7 (5 x BertLayer)" in text
    assert "bert.encoder.layer.5 " not in text
    assert "bert.encoder.layer.5" in to_text(bert, "table")


@pytest.mark.parametrize("width", [40, 60, 110])
@pytest.mark.parametrize("format", ["tree", "table"])
def test_trees_and_tables_keep_to_the_width(fast: CompiledModule, format: str, width: int) -> None:
    longest = max(map(len, to_text(fast, format, width=width).splitlines()))
    assert longest <= width


@pytest.mark.parametrize("format", FORMATS)
def test_ascii_where_nothing_else_can_be_written(fast: CompiledModule, format: str) -> None:
    assert to_text(fast, format, ascii_only=True).isascii()


def test_colour_on_a_terminal_only(conv: CompiledModule) -> None:
    for terminal in (True, False):
        file = io.StringIO()
        console = Console(file=file, force_terminal=terminal, color_system="standard" if terminal else None)
        for format in ("tree", "diff"):
            console.print(render(conv, format))
        assert ("\x1b[" in file.getvalue()) is terminal


@pytest.mark.parametrize("after", ["source", "marked", "staged"])
def test_code_is_python_and_lists_every_value(fast: CompiledModule, after: str) -> None:
    text = to_text(fast, "code", after)
    tree = ast.parse(text)
    names = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    graph = {"source": fast.source_graph, "marked": fast.graph_module, "staged": fast.program.graph_module}[after].graph
    wanted = {n.name for n in graph.nodes if n.op in ("call_function", "call_module") and n.users}
    assert wanted <= names
    assert "= None" not in text


def test_the_staged_code_is_a_page(fast: CompiledModule) -> None:
    text = to_text(fast, "code")
    assert all(f"self.stage_{i}(" in text for i in range(len(fast.exits) + 1))
    assert len(text.splitlines()) < 60


def test_the_diff_inserts_exits_and_takes_no_computation_away(conv: CompiledModule) -> None:
    lines = to_text(conv, "diff").splitlines()
    added = [x[1:].strip() for x in lines if x.startswith("+") and not x.startswith("+++")]
    removed = [x[1:].strip() for x in lines if x.startswith("-") and not x.startswith("---")]
    for e in conv.exits:
        assert any(x.startswith(f"{e.name}_head:") for x in added)
        assert any(x.startswith(f"{e.name}_confidence") for x in added)
    assert [x for x in removed if "torch.ops" in x] == []
    assert all(x.startswith("return") for x in removed)


def test_a_diff_of_a_level_with_itself_says_so(conv: CompiledModule) -> None:
    assert to_text(conv, "diff", "source") == "source and source are the same graph"


def dot_parts(text: str) -> tuple[set[str], list[tuple[str, str]]]:
    """Declared boxes and arrows; every line must be one of the known forms."""
    quoted = r'"(?:[^"\\]|\\.)*"'
    declared: set[str] = set()
    arrows = []
    depth = 0
    for line in (raw.strip() for raw in text.splitlines()):
        attribute = rf"\w+=(?:{quoted}|\w+)"
        if re.fullmatch(rf"(digraph {quoted}|subgraph cluster_\w+) {{", line):
            depth += 1
        elif line == "}":
            depth -= 1
        elif found := re.fullmatch(rf"(\w+) -> (\w+)(?: \[{attribute}(?:, {attribute})*\])?;", line):
            arrows.append((found[1], found[2]))
        elif found := re.fullmatch(rf"(\w+) \[{attribute}(?:, {attribute})*\];", line):
            declared.add(found[1])
        else:
            assert re.fullmatch(rf"(?:rankdir=TB|label={quoted});", line), line
    assert depth == 0
    return declared - {"node", "edge"}, arrows


def mermaid_parts(text: str) -> tuple[set[str], list[tuple[str, str]]]:
    """As `dot_parts`."""
    label = r'"[^"]*"'
    declared: set[str] = set()
    arrows = []
    lines = [raw.strip() for raw in text.splitlines()]
    assert lines[0] == "flowchart TD"
    assert sum(x.startswith("subgraph ") for x in lines) == lines.count("end")
    for line in lines[1:]:
        if found := re.fullmatch(rf"(\w+) (?:-->|-\.->)(?:\|{label}\|)? (\w+)", line):
            arrows.append((found[1], found[2]))
        elif found := re.fullmatch(rf"(\w+)(?:\[{label}\]|{{{{{label}}}}}|\(\[{label}\]\))", line):
            declared.add(found[1])
        else:
            assert line == "end" or re.fullmatch(rf"subgraph \w+\[{label}\]", line), line
    return declared, arrows


@pytest.mark.parametrize("format", ["dot", "mermaid"])
def test_drawings_are_valid_and_of_blocks(fast: CompiledModule, format: str) -> None:
    for after in [None, *levels(fast)]:
        text = to_text(fast, format, after)
        declared, arrows = (dot_parts if format == "dot" else mermaid_parts)(text)
        assert {x for arrow in arrows for x in arrow} <= declared
        assert len(declared) < 40
        reached = {"input"}
        for _ in declared:
            reached |= {end for start, end in arrows if start in reached}
        assert declared == reached, (format, after, declared - reached)  # everything hangs together
    heads = [f"e{i}" for i in range(len(fast.exits))]
    assert set(heads) <= declared
    leaving = {start for start, end in arrows if end == "output" and start.startswith("e")}
    assert leaving == {f"e{i}" for i, e in enumerate(fast.exits) if e.is_open}


def test_graphviz_reads_it(conv: CompiledModule) -> None:
    dot = shutil.which("dot")
    if dot is None:
        pytest.skip("Graphviz is not installed")
    done = subprocess.run([dot, "-Tsvg"], input=to_text(conv, "dot"), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "exit_0" in done.stdout


def test_json_holds_the_program_and_the_graph(fast: CompiledModule) -> None:
    data = json.loads(to_text(fast, "json"))
    assert data == to_dict(fast)
    assert [e["name"] for e in data["exits"]] == [e.name for e in fast.exits]
    marked = to_dict(fast, "marked")
    assert {n["name"] for n in marked["graph"]} == {n.name for n in fast.graph_module.graph.nodes}
    assert any(n["inserted"] for n in marked["graph"])
    assert "exits" not in marked
    assert not any(n["inserted"] for n in to_dict(fast, "source")["graph"])


def test_unknown_names_list_the_valid_ones(conv: CompiledModule) -> None:
    with pytest.raises(EecompileError, match=r"did you mean tree, table\?"):
        render(conv, "tre")
    with pytest.raises(EecompileError, match=r"did you mean find_cuts, find_blocks\?"):
        render(conv, "tree", "find_cut")


def test_a_model_captured_as_blocks_shows_and_counts_all_of_them() -> None:
    fast = eecompile(resnet(), "branchy", example_inputs=(images(),), capture="blocks")
    names = [r.name for _, _, r in outline(fast).regions() if r.kind]
    assert names == BLOCKS["conv"]  # those that no exit reads as well
    assert sum(p.share for p in outline(fast).parts) == pytest.approx(1.0)
    assert float(fast.costs([False] * len(fast.exits))[-1]) == pytest.approx(1.0)
    for after in levels(fast):
        for format in FORMATS:
            assert to_text(fast, format, after)


def test_importing_the_package_does_not_import_torch_and_printing_still_works() -> None:
    code = (
        "import sys, eecompile\n"
        "assert 'torch' not in sys.modules\n"
        "from eecompile import eecompile as build\n"
        "from eecompile.explain import Explanation\n"
        "assert Explanation.renderer is not None and callable(build)\n"
        "import eecompile\n"
        "assert sorted(set(eecompile.__all__) - set(dir(eecompile))) == []\n"
        "[getattr(eecompile, name) for name in eecompile.__all__]\n"
        "try: eecompile.nothing\n"
        "except AttributeError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "has no attribute 'nothing'" in done.stdout


def test_rendering_leaves_the_module_as_it_is(conv: CompiledModule) -> None:
    before = conv.thresholds.clone(), str(conv.graph_module.code), conv.training
    for format in FORMATS:
        to_text(conv, format)
    assert torch.equal(before[0], conv.thresholds)
    assert (str(conv.graph_module.code), conv.training) == before[1:]
