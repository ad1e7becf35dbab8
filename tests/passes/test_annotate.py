"""`annotate`: what each node costs, against counts by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from eecompile.errors import PassError
from eecompile.passes import Annotate, FindBlocks, FindCuts, Normalize, run_passes
from eecompile.program import Program
from tests.passes.conftest import Source, built, code, noise, source, token_ids


def annotated(s: Source, **options: object) -> Program:
    return run_passes(s.program(), [Normalize(), Annotate(s.example, **options)])  # type: ignore[arg-type]


def costs(program: Program) -> list[float]:
    return [f for f in program.costs.flops.values() if f]


def test_a_convolution_and_linear_layers_by_hand(lenet: Source) -> None:
    want = [
        2.0 * 24 * 24 * 6 * 25,  # 5 x 5 over one channel, 28 - 4 squared places
        2.0 * 8 * 8 * 16 * 6 * 25,
        2.0 * 256 * 120,
        2.0 * 120 * 84,
        2.0 * 84 * 10,
    ]
    program = annotated(lenet)
    assert costs(program) == want
    assert program.total_flops == sum(want)
    assert program.history["annotate"].summary == f"{sum(want) / 1e6:,.2f} MFLOPs a row"
    assert program.costs.seconds == {}
    assert program.graph_module is not None
    assert not program.history["annotate"].modified


def test_the_cost_of_a_row_does_not_depend_on_the_batch() -> None:
    model = built(lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)))
    found = [costs(annotated(source(model, (noise(rows, 8),)))) for rows in (2, 6)]
    assert found == [[2.0 * 8 * 16, 2.0 * 16 * 3]] * 2


def test_a_free_length_is_counted_at_the_examples() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.out = nn.Embedding(99, 8), nn.Linear(8, 3)

        def forward(self, ids: Tensor) -> Tensor:
            return self.out(self.embed(ids)).mean(1)

    s = source(built(Positions), (token_ids(4, 8),))
    assert costs(annotated(s)) == [8 * 2.0 * 8 * 3]
    longer = run_passes(s.program(), [Annotate((token_ids(4, 20),))])
    assert costs(longer) == [20 * 2.0 * 8 * 3]
    traced = run_passes(s.program(), [Annotate()])  # without an example: the traced length
    assert costs(traced) == [8 * 2.0 * 8 * 3]


def test_attention_costs_what_its_two_products_cost(masked: Source) -> None:
    rows, length, width = 1, 8, 16
    products = rows * 2 * 2.0 * length * length * width
    attention = [f for n, f in annotated(masked).costs.flops.items() if "attention" in n and f]
    assert attention == [products] * 3


def test_a_model_without_any_product_counts_elements() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(6))

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x * self.weight) + 1

    program = annotated(source(Scale(), (noise(4, 6),)))
    assert costs(program) == [6.0, 6.0, 6.0]


def test_measured_time(resnet: Source) -> None:
    program = annotated(resnet, measure=True, rounds=3)
    calls = [n.name for n in program.graph_module.graph.nodes if n.op == "call_function"]
    assert set(program.costs.seconds) == set(calls)
    assert all(0 < t < 10 for t in program.costs.seconds.values())
    assert program.costs.flops == annotated(resnet).costs.flops
    placed = run_passes(program, [FindBlocks(), FindCuts()])
    total = sum(program.costs.seconds.values())
    done = 0.0
    depth = {}
    for n in program.graph_module.graph.nodes:
        done += program.costs.seconds.get(n.name, 0.0)
        depth[n.name] = done / total
    for cut in placed.structure.cuts:  # depths are shares of the measured time then
        assert cut.depth == pytest.approx(depth[cut.after])


def test_measuring_needs_an_example(resnet: Source) -> None:
    with pytest.raises(PassError, match=r"measuring needs example inputs(.|\n)*example_inputs"):
        run_passes(resnet.program(), [Annotate(measure=True)])


def test_twice_is_once(masked: Source) -> None:
    once = annotated(masked)
    twice = run_passes(once, [Annotate(masked.example)])
    assert twice.costs.flops == once.costs.flops
    assert code(twice.graph_module) == code(once.graph_module)
