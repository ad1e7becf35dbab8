"""`stage`, `lower` and `verify`: the marked graph in parts, as a schedule of what survives, and held against numbers."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eecompile.criteria import Patience
from eecompile.errors import PassError
from eecompile.ir.settings import THRESHOLDS_BUFFER as THRESHOLDS
from eecompile.passes import Lower, StagePass, Verify, facts, run_passes
from eecompile.passes.lower import Schedule, schedule
from eecompile.program import Program
from tests.passes.conftest import Source, built, code, same_bits, source

SOURCES = ["resnet", "lenet", "masked", "tagger", "sequence_first", "cells"]


@pytest.fixture(params=SOURCES)
def any_source(request: pytest.FixtureRequest) -> Source:
    found: Source = request.getfixturevalue(request.param)
    return found


def calls(module: nn.Module) -> list[str]:
    assert isinstance(module, torch.fx.GraphModule)
    return [str(n.target) for n in module.graph.nodes if n.op == "call_function"]


# ------------------------------------------------------------------------------------------------ stage


def test_the_staged_graph_is_the_marked_graph_in_parts(any_source: Source) -> None:
    program = any_source.upto("stage", 2)
    staged, marked = program.graph_module, program.marked
    assert marked is not None
    assert program.level == "staged"
    parts = [n.target for n in staged.graph.nodes if n.op == "call_module" and str(n.target).startswith("stage_")]
    assert parts == [f"stage_{k}" for k in range(len(program.exits) + 1)]
    assert len(staged.graph.nodes) < len(marked.graph.nodes)
    for rows, threshold in itertools.product((1, 6), (0.0, 0.3, 2.0)):
        for graph in (staged, marked):
            getattr(graph, THRESHOLDS).fill_(threshold)
        flat = any_source.inputs(rows)
        with torch.no_grad():
            same_bits(staged(*flat), marked(*flat))
    own = {id(p) for p in marked.parameters()}
    assert {id(p) for p in staged.parameters()} <= own  # nothing is there twice


def test_stages_hold_all_the_work_once(any_source: Source) -> None:
    program = any_source.upto("stage", 2)
    assert sum(s.flops for s in program.stages) == pytest.approx(program.total_flops)
    assert [s.exit for s in program.stages] == [*range(len(program.exits)), None]
    done = 0.0
    for stage, e in zip(program.stages, program.exits, strict=False):
        done += stage.flops
        assert done / program.total_flops == pytest.approx(e.depth)
    for a, b in zip(program.stages, program.stages[1:], strict=False):
        assert b.inputs == a.outputs
    assert program.stages[0].inputs == tuple(v for v in program.stages[0].inputs if v.batch_axis is not None)


def test_what_crosses_a_stage_is_what_crosses_the_cut(masked: Source) -> None:
    program = masked.upto("stage", "every-block")
    by_name = {c.name: c for c in program.structure.cuts}
    for stage, e in zip(program.stages, program.exits, strict=False):
        assert {v.node for v in stage.outputs} == {v.node for v in by_name[e.cut].live}


def test_stage_wants_a_marked_program(resnet: Source) -> None:
    with pytest.raises(PassError, match="pass 'stage' cannot run yet"):
        run_passes(resnet.upto("place_exits"), [StagePass()])


# ------------------------------------------------------------------------------------------------ lower


def segments_of(program: Program, *open_exits: int, decide: bool = False) -> Schedule:
    return schedule(program, open_exits, decide)


def by_hand(program: Program, found: Schedule, flat: list[Tensor]) -> list[Any]:
    """Runs the segments one after the other without letting anybody leave: decisions, then the prediction."""
    live: list[Any] = list(flat)
    state: tuple[Tensor, ...] = ()
    seen: list[Any] = []
    with torch.no_grad():
        for s in found.segments:
            assert len(live) == len(s.inputs)
            values = s.module(*live, *state[: s.takes_states])
            if s.exit is None:
                seen.append(values)
                break
            seen.append(values[: s.decision])
            state = values[2 : s.decision]
            live = list(values[s.decision + len(s.leaves) + len(s.reports) :])
            assert len(live) == len(s.outputs)
    return seen


def test_segments_give_what_the_marked_graph_gives(any_source: Source) -> None:
    program = any_source.upto("verify", 2, threshold=0.3)
    count, leaves = len(program.exits), len(program.signature.outputs)
    flat = any_source.inputs(4)
    assert program.marked is not None
    with torch.no_grad():
        want = program.marked(*flat)[leaves + 2 :]
    for open_exits in itertools.chain.from_iterable(itertools.combinations(range(count), k) for k in range(count + 1)):
        found = segments_of(program, *open_exits)
        assert [s.exit for s in found.segments] == [*open_exits, None]
        seen = by_hand(program, found, flat)
        for k, values in zip(open_exits, seen, strict=False):
            same_bits([values[0], values[1]], [want[k], want[count + 1 + k]])
        axis = program.signature.outputs[0].batch_axis or 0
        same_bits([seen[-1][-1].movedim(axis, 0)], [want[count]])


def test_a_closed_exit_costs_nothing(resnet: Source) -> None:
    """Neither its head nor its decision runs, and the stages around it are one."""
    program = resnet.upto("verify", "every-block", head="conv")
    every = segments_of(program, *range(len(program.exits)))
    none = segments_of(program)
    (only,) = none.segments
    source_calls = calls(program.history["normalize"].graph_module)
    assert calls(only.module) == source_calls
    one = segments_of(program, 2)
    assert len(one.segments) == 2
    extra = sorted(calls(one.segments[0].module) + calls(one.segments[1].module))
    for call in source_calls:
        extra.remove(call)
    assert not any("conv" in c or "batch_norm" in c for c in extra)  # the head is one module, called once
    heads = [n.target for s in one.segments for n in s.module.graph.nodes if n.op == "call_module"]
    assert heads == ["eecompile_heads.exit_2"]
    assert sum(len(calls(s.module)) for s in every.segments) > len(calls(only.module))


def test_only_what_is_needed_survives(cells: Source) -> None:
    program = cells.upto("verify", ["cell@1", "cell@3"])
    for segment in segments_of(program, 0, 1).segments[:-1]:
        names = facts.by_name(program.marked)  # type: ignore[arg-type]
        nodes = list(program.marked.graph.nodes)  # type: ignore[union-attr]
        assert segment.exit is not None
        p = nodes.index(names[program.exits[segment.exit].after])
        for v in segment.outputs:
            users = [u for u in names[v.node].users if nodes.index(u) > p and "eecompile" not in u.meta]
            later = {n for e in program.exits[segment.exit + 1 :] for n in e.head_inputs}
            assert users or v.node in later, v.node


def test_segments_run_on_any_number_of_rows(any_source: Source) -> None:
    """Sizes are read from what comes in, not from the batch that the graph began with."""
    program = any_source.upto("verify", 2)
    found = segments_of(program, 0, 1)
    flat = any_source.inputs(6)
    first, second, last = found.segments
    with torch.no_grad():
        given = list(first.module(*flat)[first.decision :])
        whole = list(second.module(*given)[second.decision :])
        want = last.module(*whole)[-1]
        keep = torch.tensor([4, 1])
        fewer = [
            t if v.batch_axis is None else t.index_select(v.batch_axis, keep)
            for t, v in zip(given, second.inputs, strict=True)
        ]
        rest = list(second.module(*fewer)[second.decision :])
        got = last.module(*rest)[-1]
    axis = program.signature.outputs[0].batch_axis or 0
    torch.testing.assert_close(got, want.index_select(axis, keep), rtol=1e-5, atol=1e-6)


def test_the_state_of_patience_is_handed_on(resnet: Source) -> None:
    program = resnet.upto("verify", "every-block", criterion=Patience(), head="linear", threshold=1.0)
    found = segments_of(program, 0, 2, 3, decide=True)
    assert [s.takes_states for s in found.segments] == [0, 1, 1, 1]
    assert [s.gives_states for s in found.segments] == [1, 1, 1, 0]
    thresholds = torch.full((len(program.exits),), 2.0)
    thresholds[[0, 2, 3]] = 1.0
    getattr(program.marked, THRESHOLDS).copy_(thresholds)
    flat = resnet.inputs(8)
    seen = by_hand(program, found, flat)
    with torch.no_grad():
        want = program.marked(*flat)[3:]  # type: ignore[misc]
    count = len(program.exits)
    for k, values in zip((0, 2, 3), seen, strict=False):
        same_bits([values[1]], [want[count + 1 + k]])


def test_lower_says_what_survives(masked: Source) -> None:
    program = masked.upto("lower", 2)
    assert program.level == "schedule"
    assert program.history["lower"].summary.startswith("3 segments, tensors that survive: ")
    again = run_passes(program, [Lower()])
    assert again.history[-1].summary == program.history["lower"].summary
    assert again.graph_module is program.graph_module


# ------------------------------------------------------------------------------------------------ verify


def test_verify_compares_and_puts_everything_back(resnet: Source) -> None:
    program = resnet.upto("lower", 2, threshold=(0.25, 0.75))
    assert program.marked is not None
    program.marked.eecompile_heads.train()
    before = code(program.graph_module), code(program.marked)
    flags = {n: m.training for n, m in program.marked.named_modules()}
    done = run_passes(program, [Verify(resnet.example)])
    assert "give the captured graph's output bit for bit" in done.history["verify"].summary
    assert getattr(program.marked, THRESHOLDS).tolist() == [0.25, 0.75]
    assert {n: m.training for n, m in program.marked.named_modules()} == flags
    assert (code(done.graph_module), code(done.marked)) == before  # type: ignore[arg-type]
    assert done.graph_module is program.graph_module


def test_verify_without_an_example_says_that_it_compared_nothing(resnet: Source) -> None:
    program = run_passes(resnet.upto("lower"), [Verify()])
    assert program.history["verify"].summary == "no example: numbers not compared"


@pytest.mark.parametrize("level", ["marked", "staged"])
def test_verify_catches_a_rewrite_that_changes_a_number(level: str) -> None:
    s = source(built(Deep), (torch.randn(4, 8, generator=torch.Generator().manual_seed(0)),))
    program = s.upto("lower", 2)
    broken = program.marked if level == "marked" else program.graph_module.get_submodule("stage_1")
    assert isinstance(broken, torch.fx.GraphModule)
    relu = [n for n in broken.graph.nodes if n.target is torch.ops.aten.relu.default][-1]
    relu.target = torch.ops.aten.gelu.default
    broken.recompile()
    with pytest.raises(PassError, match="does not compute what the captured one does") as error:
        run_passes(program, [Verify(s.example)])
    assert error.value.where is not None
    assert error.value.where.startswith(level)
    assert "output 0 differs by" in str(error.value.got)
    assert getattr(program.marked, THRESHOLDS).tolist() == pytest.approx([0.9, 0.9])


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(4))
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for b in self.blocks:
            x = b(x)
        return self.out(x)
