"""`find_cuts`: positions with everything that later work needs, and the positions where the work cannot stop."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor, fx, nn

from eecompile.passes import FindBlocks, FindCuts, facts, run_passes
from eecompile.program import Cut, Prediction, Program
from tests.passes.conftest import Source, built, code, masked_call, noise, source, token_ids


def live(cut: Cut) -> dict[str, int | None]:
    return {v.node: v.batch_axis for v in cut.live}


def reasons(program: Program) -> dict[str, str]:
    return {r.node: r.reason for r in program.refusals if r.rule == "find_cuts"}


@pytest.mark.parametrize("name", ["resnet", "lenet", "masked", "sequence_first", "cells"])
def test_a_live_set_is_all_that_the_rest_needs(name: str, request: pytest.FixtureRequest) -> None:
    """Checked on the graph itself: every value that crosses the position, sizes apart, is in the set, and no other."""
    program = request.getfixturevalue(name).upto("find_cuts")
    nodes = list(program.graph_module.graph.nodes)
    position = {n: i for i, n in enumerate(nodes)}
    names = facts.by_name(program.graph_module)
    assert program.structure.cuts
    for cut in program.structure.cuts:
        p = position[names[cut.after]]
        crossing = {
            n.name
            for n in nodes[: p + 1]
            if facts.is_tensor(n) and n.op != "get_attr" and any(position[u] > p for u in n.users)
        }
        assert set(live(cut)) == crossing, cut.name
        assert cut.value in live(cut)
        assert 0 <= cut.depth < 1
    depths = [c.depth for c in program.structure.cuts]
    assert depths == sorted(depths)


def test_one_value_between_residual_blocks(resnet: Source) -> None:
    program = resnet.upto("find_cuts")
    blocks = [c for c in program.structure.cuts if c.is_block]
    assert [c.name for c in blocks] == [f"layer{i}.{j}" for i in (1, 2, 3) for j in (0, 1)]
    assert all(len(c.live) == 1 and c.dominates for c in blocks)
    total = program.total_flops
    spent = sum(program.costs.flops[n.name] for n in program.graph_module.graph.nodes if n.name.startswith("conv"))
    assert blocks[-1].depth == pytest.approx(spent / total)


def test_the_mask_and_what_comes_of_it_cross_with_the_rows(masked: Source) -> None:
    cuts = masked.upto("find_cuts").structure.cuts
    assert [c.name for c in cuts if c.is_block] == ["layers.0", "layers.1", "layers.2"]
    for cut in cuts:
        if cut.name in ("layers.0", "layers.1"):
            assert live(cut)["attention_mask"] == 0
            assert all(axis == 0 for axis in live(cut).values())
            assert cut.dominates  # though the mask goes round it
            assert [v.node for v in cut.live if v.trunk] == [cut.value]


def test_the_batch_may_be_on_another_axis(sequence_first: Source) -> None:
    blocks = [c for c in sequence_first.upto("find_cuts").structure.cuts if c.is_block]
    assert [c.name for c in blocks] == [f"enc.layers.{i}" for i in range(4)]
    assert [live(c)[c.value] for c in blocks] == [1] * 4


def test_a_cell_hands_on_two_values_and_the_tail_says_which_is_read(cells: Source) -> None:
    program = cells.upto("find_cuts")
    names = facts.by_name(program.graph_module)
    blocks = [c for c in program.structure.cuts if c.is_block]
    assert [c.name for c in blocks] == ["cell", *(f"cell@{k}" for k in range(1, 5))] + ["cell@5"] * (len(blocks) == 6)
    final = names[blocks[-1].value]
    for c in blocks[:-1]:
        trunk = [v.node for v in c.live if v.trunk]
        assert len(trunk) == 3  # h, c, and the embedded tokens of the steps to come
        assert str(names[c.value].target) == str(final.target)


def test_bottlenecks_of_a_model_without_blocks(lenet: Source) -> None:
    program = lenet.upto("find_cuts")
    assert not any(c.is_block for c in program.structure.cuts)
    assert all(c.dominates and len(c.live) == 1 for c in program.structure.cuts)
    # one place for every amount of work: after the pooling, where the fewest numbers cross
    shapes = [next(v.shape for v in c.live if v.node == c.value) for c in program.structure.cuts]
    assert shapes == [("batch", 6, 12, 12), ("batch", 256), ("batch", 120), ("batch", 84)]
    none = run_passes(lenet.upto("find_blocks"), [FindCuts(bottlenecks=False)])
    assert none.structure.cuts == ()


class Parallel(nn.Module):
    """Two branches from one stem, joined at the end: nothing dominates in between."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.out = nn.Linear(8, 8), nn.Linear(16, 3)
        self.left, self.right = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        return self.out(torch.cat([torch.tanh(self.left(x)), torch.relu(self.right(x))], 1))


def test_inside_parallel_branches_there_is_no_bottleneck() -> None:
    program = source(built(Parallel), (noise(4, 8),)).upto("find_cuts")
    shapes = {c.value: next(v.shape[1] for v in c.live if v.node == c.value) for c in program.structure.cuts}
    assert list(shapes.values()) == [8, 16]  # after the stem and after the join
    assert not any("tanh" in name for name in shapes)


class Again(nn.Module):
    """Scores first, then the same blocks once more for an output of features."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(3)])
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.out(self.blocks(x)), "features": self.blocks(x)}


def test_there_is_no_cut_after_the_prediction() -> None:
    program = source(built(Again), (noise(4, 8),)).upto("find_cuts")
    order = [n.name for n in program.graph_module.graph.nodes]
    given = facts.output_leaves(program.graph_module)[program.prediction.index or 0].name
    assert program.structure.cuts and all(order.index(c.value) <= order.index(given) for c in program.structure.cuts)
    assert "the prediction is computed before this place" in reasons(program).values()


class Folding(nn.Module):
    """Blocks that hand on their windows, with the batch folded into the first axis."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Linear(8, 16), nn.Linear(4, 3)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x).view(-1, 4)
        for block in self.blocks:
            h = block(h)
        return self.out(h).view(x.shape[0], 4, 3).sum(1)


def test_a_folded_batch_cannot_be_cut() -> None:
    program = source(built(Folding), (noise(4, 8),)).upto("find_cuts")
    assert [b.name for b in program.structure.blocks] == [f"blocks.{i}" for i in range(3)]
    assert not any(c.is_block for c in program.structure.cuts)
    for b in program.structure.blocks[:2]:
        assert "folds the batch into axis 0" in reasons(program)[b.name]


class Squares(nn.Module):
    """A matrix of rows against rows crosses the block: the batch is on two axes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.a(x))
        same = (x @ x.transpose(0, 1)) * 0.0
        return self.b(torch.relu(self.a(h))) + same.diagonal()[:, None]


def test_a_value_with_the_batch_on_two_axes_cannot_cross() -> None:
    program = source(built(Squares), (noise(4, 8),)).upto("find_cuts")
    assert any("carries the batch on 2 axes" in reason for reason in reasons(program).values())


class Flags(nn.Module):
    """Blocks that hand on a mask of booleans."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(2))
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = (block(x) > 0.1).to(x.dtype)
        return self.out(x)


def test_each_cut_reads_a_floating_point_value() -> None:
    program = source(built(Flags), (noise(4, 8),)).upto("find_cuts")
    assert program.structure.cuts
    for cut in program.structure.cuts:
        value = next(v for v in cut.live if v.node == cut.value)
        assert value.dtype == "float32"


def test_cuts_have_anchors_of_their_own(masked: Source) -> None:
    program = masked.upto("find_cuts")
    anchors = facts.anchors(program.graph_module.graph.nodes)
    names = facts.by_name(program.graph_module)
    assert len({c.anchor for c in program.structure.cuts}) == len(program.structure.cuts)
    for c in program.structure.cuts:
        assert anchors[names[c.value]] == c.anchor


def test_twice_is_once(masked: Source) -> None:
    once = masked.upto("find_cuts")
    twice = run_passes(once, [FindCuts()])
    assert twice.structure.cuts == once.structure.cuts
    assert code(twice.graph_module) == code(once.graph_module)
    assert not twice.history[-1].modified


# ------------------------------------------------------------------------------------------------ size


def stretched(s: Source, blocks: int) -> Program:
    """A graph of so many blocks, made by copying the last block of a captured model after itself."""
    gm = s.upto("annotate").graph_module
    first, final = run_passes(s.upto("annotate"), [FindBlocks()]).structure.blocks[-2:]
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    nodes = list(gm.graph.nodes)
    index = {n.name: i for i, n in enumerate(nodes)}
    body = nodes[index[final.first] : index[final.last] + 1]
    given, taken = nodes[index[final.output]], nodes[index[first.output]]
    for n in nodes:
        if n is body[0]:
            for k in range(blocks):
                for b in body:
                    env[b] = graph.node_copy(b, lambda a: env[a])
                    path = f"layers.{k + 2}"
                    env[b].meta["stack"] = tuple((p.replace("layers.2", path), c, t) for p, c, t in facts.stack(b))
                env[taken] = env[given]
        elif n not in body and n.op != "output":
            env[n] = graph.node_copy(n, lambda a: env[a])
    graph.output(tuple(env[a] for a in facts.output_leaves(gm)))
    big = fx.GraphModule(gm, graph)
    program = Program(big, big, s.captured.signature, prediction=Prediction(0)).establish("normalized", "costs")
    per_node = {n.name: 1.0 if "linear" in n.name else 0.0 for n in graph.nodes}
    return program.replace(flops=per_node)


@pytest.mark.nightly
def test_ten_thousand_nodes_in_well_under_half_a_minute() -> None:
    s = source(built(lambda: Plain(3)), (), masked_call())
    program = stretched(s, 500)
    count = len(program.graph_module.graph.nodes)
    assert count >= 10_000
    start = time.process_time()  # of this process: the machine may be busy
    done = run_passes(program, [FindBlocks(), FindCuts()])
    seconds = time.process_time() - start
    assert len(done.structure.blocks) == 502
    assert [c.name for c in done.structure.cuts if c.is_block] == [f"layers.{i}" for i in range(502)]
    assert all(c.dominates for c in done.structure.cuts)
    assert seconds < 30, f"{count} nodes took {seconds:.1f} s"


class Plain(nn.Module):
    """As `Masked`, with so many operators in a block that 400 of them are 10,000 nodes."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(99, 8)
        self.layers = nn.ModuleList(Layer() for _ in range(blocks))
        self.out = nn.Linear(8, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        h = self.embed(input_ids)
        for layer in self.layers:
            h = layer(h, attention_mask)
        return self.out(h).mean(1)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU()) for _ in range(3))

    def forward(self, h: Tensor, mask: Tensor) -> Tensor:
        for part in self.parts:
            h = h + part(h) * mask[:, :, None].to(h.dtype)
        return h


@pytest.mark.nightly
def test_the_stretched_graph_is_a_real_one() -> None:
    """What the test above counts on: it runs, and each block is in it."""
    s = source(built(lambda: Plain(3)), (), masked_call())
    program = stretched(s, 4)
    ids, mask = token_ids(3), torch.ones(3, 8, dtype=torch.long)
    with torch.no_grad():
        got = program.graph_module(ids, mask)[0]
    assert got.shape == (3, 3)
    assert torch.isfinite(got).all()
