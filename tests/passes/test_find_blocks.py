"""`find_blocks`: the unit that repeats, groups that are passed over and why, intervals that hold the block's own work."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from eecompile.errors import StrategyError
from eecompile.passes import Annotate, FindBlocks, Normalize, facts, run_passes
from eecompile.program import Program
from tests import zoo_plain as plain
from tests.passes.conftest import Source, built, code, noise, source


def found(s: Source, pattern: str | None = None) -> Program:
    return run_passes(s.program(), [Normalize(), Annotate(s.example), FindBlocks(pattern)])


def names(program: Program) -> list[str]:
    return [b.name for b in program.structure.blocks]


def reasons(program: Program) -> dict[str, str]:
    return {r.node: r.reason for r in program.refusals if r.rule == "find_blocks"}


def test_residual_blocks_across_three_sequences(resnet: Source) -> None:
    program = found(resnet)
    assert names(program) == [f"layer{i}.{j}" for i in (1, 2, 3) for j in (0, 1)]
    assert {b.kind for b in program.structure.blocks} == {"BasicBlock"}
    assert program.history["find_blocks"].summary == "6 blocks layer*.* (BasicBlock)"
    assert reasons(program)["layer*"] == "3 members, but another group fits better"


def test_a_block_is_an_interval_of_its_own_nodes(resnet: Source) -> None:
    program = found(resnet)
    nodes = list(program.graph_module.graph.nodes)
    position = {n.name: i for i, n in enumerate(nodes)}
    for before, b in zip((None, *program.structure.blocks), program.structure.blocks, strict=False):
        first, last = position[b.first], position[b.last]
        inside = [n for n in nodes[first : last + 1] if n.op == "call_function"]
        assert all(b.name in [path for path, _, _ in facts.stack(n)] for n in inside)
        assert first <= position[b.output] <= last
        assert b.flops == sum(program.costs.flops[n.name] for n in inside)
        assert before is None or position[before.last] < first
    last = nodes[position[program.structure.blocks[-1].last]]
    assert program.structure.blocks[-1].output == last.name


def test_a_cell_that_is_called_once_per_step(cells: Source) -> None:
    program = found(cells)
    assert names(program) == ["cell", *(f"cell@{k}" for k in range(1, 6))]
    assert {b.kind for b in program.structure.blocks} == {"LSTMCell"}


def test_blocks_under_a_list_of_lists() -> None:
    """Nothing calls a `ModuleList`: the block above one is found all the same, not the pieces inside."""
    program = found(source(built(lambda: plain.MSDNet(3)), (noise(4, 3, 32, 32),)))
    assert names(program) == [f"blocks.{i}" for i in range(3)]
    assert {b.kind for b in program.structure.blocks} == {"DenseBlock"}


def test_a_layer_that_is_shared_counts_once_per_call() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
            self.out = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(3):
                x = self.layer(x)
            return self.out(x)

    assert names(found(source(built(Shared), (noise(4, 8),)))) == ["layer", "layer@1", "layer@2"]


class Interleaved(nn.Module):
    """Two towers whose layers take turns: each tower's container wraps around the other's."""

    def __init__(self) -> None:
        super().__init__()
        self.towers = nn.ModuleList(nn.ModuleList(nn.Linear(8, 8) for _ in range(2)) for _ in range(2))
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for i in range(2):
            for tower in self.towers:
                x = torch.relu(tower[i](x))
        return self.out(x)


class Pair(nn.Module):
    """Calls its second part after that of its twin, so that both cover the same stretch of the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, other: Pair | None = None) -> Tensor:
        x = torch.relu(self.a(x))
        if other is not None:
            x = other(x)
        return torch.relu(self.b(x))


class Overlapping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pairs = nn.ModuleList([Pair(), Pair()])
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.pairs[0](x, self.pairs[1]))


def test_members_that_overlap_are_no_blocks() -> None:
    program = found(source(built(Overlapping), (noise(4, 8),)))
    assert reasons(program) == {"pairs.*": "its members overlap in the graph"}
    assert program.structure.blocks == ()
    with pytest.raises(StrategyError, match="passed over: its members overlap"):
        found(source(built(Overlapping), (noise(4, 8),)), "pairs.*")
    assert program.history["find_blocks"].summary == "no repeated block"


class Small(nn.Module):
    """Two little blocks in a graph of much else."""

    def __init__(self) -> None:
        super().__init__()
        self.tiny = nn.ModuleList(nn.Sequential(nn.Linear(8, 8)) for _ in range(2))
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tiny[1](self.tiny[0](x))
        for i in range(12):
            x = torch.relu(self.first(x)) + i
        return self.last(x)


def test_a_group_that_covers_little_is_passed_over() -> None:
    s = source(built(Small), (noise(4, 8),))
    program = found(s)
    assert "covers" in reasons(program)["tiny.*"]
    assert program.structure.blocks == ()
    assert names(found(s, "tiny.*")) == ["tiny.0", "tiny.1"]  # unless it is asked for


def test_a_model_without_repetition_has_none(lenet: Source) -> None:
    program = found(lenet)
    assert program.structure.blocks == ()
    assert reasons(program) == {}


def test_the_unit_can_be_chosen(resnet: Source) -> None:
    assert names(found(resnet, "layer*")) == ["layer1", "layer2", "layer3"]
    with pytest.raises(StrategyError, match=r"no repeated module has this path(.|\n)*did you mean layer\*\.\*") as error:
        found(resnet, "layer*.*.conv")
    assert error.value.got == "layer*.*.conv"


def test_twice_is_once(resnet: Source) -> None:
    once = found(resnet)
    twice = run_passes(once, [FindBlocks()])
    assert twice.structure.blocks == once.structure.blocks
    assert code(twice.graph_module) == code(once.graph_module)
    assert not twice.history[-1].modified


def test_towers_that_take_turns_have_no_common_unit() -> None:
    """The containers are never called, and single layers are no blocks."""
    assert found(source(built(Interleaved), (noise(4, 8),))).structure.blocks == ()
