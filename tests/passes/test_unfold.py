"""Values with the batch folded into another axis go past exits and into gates: gathered unfolded, rows stay in order."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from eecompile import CompiledModule, load, strategies
from tests.support import again, agree, close, neutral
from tests.support import compiled as eecompile

WIDTH, HEADS = 8, 2


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        b, s, _ = x.shape
        parts = self.qkv(x).view(b, s, 3 * HEADS, WIDTH // HEADS).transpose(1, 2)
        q, k, v = (p.reshape(b * HEADS, s, -1) for p in parts.split(HEADS, 1))
        scores = torch.baddbmm(bias, q, k.transpose(1, 2)).softmax(2)
        y = torch.bmm(scores, v).view(b, HEADS, s, -1).transpose(1, 2).reshape(b, s, WIDTH)
        return x + self.out(y)


class Folded(nn.Module):
    """Tokens [B, S] to [B, 3]; a bias `[B * heads, 1, S]`, made once, goes to every block, as in Bloom."""

    def __init__(self, fold: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fold = fold
        self.emb = nn.Embedding(50, WIDTH)
        self.layers = nn.ModuleList(Attention() for _ in range(4))
        self.out = nn.Linear(WIDTH, 3)

    def forward(self, ids: Tensor) -> Tensor:
        bias = self.fold((ids % 7).float())
        x = self.emb(ids)
        for layer in self.layers:
            x = layer(x, bias)
        y: Tensor = self.out(x.mean(1))
        return y


SLOPES = torch.tensor([0.5, 0.25])
FOLDS = {
    "heads next to rows": lambda m: (SLOPES.view(1, -1, 1, 1) * m[:, None, None, :]).reshape(-1, 1, m.shape[1]),
    "rows repeated": lambda m: m.repeat_interleave(HEADS, 0).unsqueeze(1) * 0.5,
    "flattened and negated": lambda m: -m.unsqueeze(1).expand(-1, HEADS, -1).flatten(0, 1).unsqueeze(1).tanh(),
}


def tokens(rows: int, steps: int = 6) -> Tensor:
    return torch.randint(0, 50, (rows, steps), generator=torch.Generator().manual_seed(rows))


@pytest.fixture(scope="module", params=sorted(FOLDS))
def fast(request: pytest.FixtureRequest) -> CompiledModule:
    model = Folded(FOLDS[request.param]).eval()
    return eecompile(model, strategies.Branchy(exits="every-block"), example_inputs=(tokens(6),))


def test_exits_lie_between_all_blocks(fast, tmp_path):
    assert [e.cut for e in fast.exits] == [f"layers.{k}" for k in range(3)]
    assert any(n.target is torch.ops.aten.unflatten.int for n in fast.graph_module.graph.nodes)
    assert fast.original is not None
    for rows, steps in ((6, 6), (1, 6), (3, 9)):
        neutral(fast)
        close(fast(tokens(rows, steps)), fast.original(tokens(rows, steps)))
    ids = tokens(9)
    thresholds = [float(c.sort().values[3:5].mean()) for c in fast.observe(ids).confidences[:-1]]
    fast.set_thresholds(thresholds)
    assert len(set(agree(fast, (ids,), {}).exit_index.tolist())) > 1
    fast.save(tmp_path / "program")
    close(load(tmp_path / "program")(ids), fast(ids))


def test_gated_blocks_read_it_on_their_own_rows(fast):
    gated = again(fast, strategies.SkipNet(unit="linear"))
    ids = tokens(9)
    gated.set_gate_thresholds(gated.observe(ids).trace.gate_scores.sort(0).values[3:5].mean(0).tolist())
    assert len(set(agree(gated, (ids,), {}).gates.sum(1).tolist())) > 1


def test_heads_that_count_before_rows():
    class HeadsFirst(Folded):
        def forward(self, ids: Tensor) -> Tensor:
            bias, b = self.fold((ids % 7).float()), ids.shape[0]  # [heads * B, 1, S]
            x = self.emb(ids)
            for layer in self.layers:
                x = layer(x, bias.view(HEADS, b, 1, -1).transpose(0, 1).reshape(b * HEADS, 1, -1))
            y: Tensor = self.out(x.mean(1))
            return y

    model = HeadsFirst(lambda m: torch.stack([m, m * 0.5]).flatten(0, 1).unsqueeze(1)).eval()
    fast = eecompile(model, strategies.Branchy(exits="every-block"), example_inputs=(tokens(6),))
    assert len(fast.exits) == 3
    ids = tokens(9)
    neutral(fast)
    close(fast(ids), model(ids))
    fast.set_thresholds([float(c.sort().values[3:5].mean()) for c in fast.observe(ids).confidences[:-1]])
    assert len(set(agree(fast, (ids,), {}).exit_index.tolist())) > 1
