"""`adopt_blocks` and the stages of a model that was captured as blocks: costs and places as the front end measured them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from eecompile.errors import StrategyError
from eecompile.passes import AdoptBlocks, InsertExits, PlaceExits, StageBlocks, Verify, run_passes
from eecompile.program import Program
from tests import zoo_plain as plain
from tests.passes.conftest import Masked as MaskedModel
from tests.passes.conftest import Source, built, code, masked_call, noise, recipe, same_bits, source

LAYERS = [f"layer{i}.{j}" for i in (1, 2, 3) for j in (0, 1)]


@pytest.fixture(scope="module")
def as_blocks() -> Source:
    return source(built(lambda: plain.CifarResNet(2, 8)), (noise(4, 3, 16, 16),), capture_as="blocks")


def adopted(s: Source) -> Program:
    return run_passes(s.program(), [AdoptBlocks(s.captured.blocks)])


def test_blocks_cuts_and_costs_are_those_of_the_graph(as_blocks: Source, resnet: Source) -> None:
    """The other front end measures the same model."""
    program, graph = adopted(as_blocks), resnet.upto("find_cuts")
    assert [b.name for b in program.structure.blocks] == [b.name for b in graph.structure.blocks] == LAYERS
    assert program.total_flops == pytest.approx(graph.total_flops)
    want = {c.name: c.depth for c in graph.structure.cuts if c.is_block}
    assert {c.name: c.depth for c in program.structure.cuts} == pytest.approx(want)
    assert all(c.is_block and c.dominates for c in program.structure.cuts)
    assert {"normalized", "costs", "blocks", "cuts"} <= program.history.facts
    assert program.history["adopt_blocks"].summary == "6 blocks"


def test_a_blocks_value_and_the_inputs_survive() -> None:
    s = source(built(MaskedModel), (), masked_call(), capture_as="blocks")
    for cut in adopted(s).structure.cuts:
        assert {v.node for v in cut.live[1:]} == {"input_ids", "attention_mask"}
        assert cut.live[0].batch_axis == 0
        assert cut.live[0].shape == ("batch", "seq", 16)


def test_without_a_product_every_block_counts_the_same() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Identity()
            self.weight = nn.Parameter(torch.rand(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x * self.weight)

    model = built(lambda: nn.Sequential(Scale(), Scale(), Scale()))
    program = adopted(source(model, (noise(4, 3),), capture_as="blocks"))
    assert [c.depth for c in program.structure.cuts] == [0.25, 0.5, 0.75]


def placed(s: Source, where: object = 2) -> Program:
    wanted = recipe(where, head="linear", threshold=2.0)
    passes = [PlaceExits(wanted, s.example), InsertExits(wanted.head, wanted.threshold), StageBlocks(), Verify(s.example)]
    return run_passes(adopted(s), passes)


def test_stages_hold_the_work_between_the_exits(as_blocks: Source) -> None:
    program = placed(as_blocks, "every-block")
    assert [e.cut for e in program.exits] == LAYERS[:-1]
    assert [s.exit for s in program.stages] == [*range(5), None]
    assert sum(s.flops for s in program.stages) == pytest.approx(program.total_flops)
    assert program.level == "schedule"
    assert program.history["stage"].summary == "6 stages, run by gather and scatter around the blocks"


def test_with_the_exits_closed_it_is_the_model(as_blocks: Source) -> None:
    program = placed(as_blocks)
    assert program.marked is not None
    for rows in (1, 5):
        flat = as_blocks.inputs(rows)
        with torch.no_grad():
            same_bits(program.marked(*flat)[:1], program.source(*flat)[:1])


def test_there_is_no_graph_of_the_tail(as_blocks: Source) -> None:
    with pytest.raises(StrategyError, match="own final layers cannot be reused") as error:
        run_passes(adopted(as_blocks), [PlaceExits(recipe(2, head="shared"), as_blocks.example)])
    assert "captured as blocks" in str(error.value.got)


def test_the_given_program_stays_and_twice_is_once(as_blocks: Source) -> None:
    before = as_blocks.program()
    text = code(before.graph_module)
    once = adopted(as_blocks)
    twice = run_passes(once, [AdoptBlocks(as_blocks.captured.blocks)])
    assert (twice.structure, twice.costs.flops) == (once.structure, once.costs.flops)
    assert code(before.graph_module) == text
    assert before.structure.blocks == ()
