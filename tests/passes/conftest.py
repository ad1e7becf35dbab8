"""Real small models, captured once, and the way to the state before any pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from eecompile.capture import Captured, capture
from eecompile.criteria import Criterion, Entropy
from eecompile.ir.recipes import ExitRecipe
from eecompile.passes import (
    Annotate,
    FindBlocks,
    FindCuts,
    InsertExits,
    Lower,
    Normalize,
    Pass,
    PlaceExits,
    StagePass,
    Verify,
    run_passes,
)
from eecompile.program import Capture, Prediction, Program
from tests import zoo_plain as plain

ORDER = ["normalize", "annotate", "find_blocks", "find_cuts", "place_exits", "insert_exits", "stage", "lower", "verify"]


def recipe(where: Any = 2, head: Any = "auto", criterion: Criterion | None = None, **options: Any) -> ExitRecipe:
    return ExitRecipe(where, head, criterion or Entropy(), options.pop("threshold", 0.9), **options)


@dataclass(frozen=True)
class Source:
    """A captured model, and the programs that come of it."""

    captured: Captured = field(repr=False)

    @property
    def example(self) -> tuple[Tensor, ...]:
        assert self.captured.flat_example is not None
        return self.captured.flat_example

    def program(self, prediction: int | None = 0) -> Program:
        gm = self.captured.graph_module
        capture = Capture(self.captured.front_end)
        return Program(gm, gm, self.captured.signature, prediction=Prediction(prediction), capture=capture)

    def passes(self, where: Any = 2, **options: Any) -> list[Pass]:
        wanted = recipe(where, **options)
        return [
            Normalize(),
            Annotate(self.example),
            FindBlocks(),
            FindCuts(),
            PlaceExits(wanted, self.example),
            InsertExits(wanted.head, wanted.threshold),
            StagePass(),
            Lower(),
            Verify(self.example),
        ]

    def upto(self, last: str, where: Any = 2, **options: Any) -> Program:
        """The program after the pass of that name."""
        return run_passes(self.program(), self.passes(where, **options)[: ORDER.index(last) + 1])

    def named(self, rows: int, seed: int = 3) -> dict[str, Tensor]:
        """`inputs` by the names of the model's arguments."""
        paths = [leaf.path for leaf in self.captured.signature.inputs]
        return dict(zip(paths, self.inputs(rows, seed), strict=True))

    def inputs(self, rows: int, seed: int = 3) -> list[Tensor]:
        """Other flat inputs of the same kind: rows of the example, mixed."""
        g = torch.Generator().manual_seed(seed)
        signature = self.captured.signature
        pick = torch.randint(signature.batch_size(self.example), (rows,), generator=g)
        out = []
        for t, leaf in zip(self.example, signature.inputs, strict=True):
            t = t if leaf.batch_axis is None else t.index_select(leaf.batch_axis, pick)
            out.append(t + torch.randn(t.shape, generator=g) if t.is_floating_point() else t)
        return out


def source(
    model: nn.Module, args: Sequence[Tensor] = (), kwargs: Mapping[str, Any] | None = None, capture_as: str = "export"
) -> Source:
    return Source(capture(model.eval(), args, dict(kwargs or {}), front_end=capture_as))


def built(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A model with its own weights; the global generator stays where it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().eval()


def noise(*sizes: int, seed: int = 0) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed))


def token_ids(rows: int = 4, length: int = 8) -> Tensor:
    return torch.randint(1, plain.VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(0))


class Masked(nn.Module):
    """Ids and a padding mask; residual attention and feed-forward blocks; one prediction a row or one a position."""

    def __init__(self, positions: bool = False, blocks: int = 3, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(plain.VOCABULARY, width)
        self.layers = nn.ModuleList(Attend(width) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, 5)
        self.positions = positions

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        h = self.embed(input_ids)
        for layer in self.layers:
            h = layer(h, attention_mask)
        h = self.norm(h)
        if self.positions:
            return self.out(h)
        real = attention_mask.unsqueeze(-1).to(h.dtype)
        return self.out((h * real).sum(1) / real.sum(1))


class Attend(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.wide = nn.Linear(width, 2 * width)
        self.narrow = nn.Linear(2 * width, width)

    def forward(self, h: Tensor, mask: Tensor) -> Tensor:
        b, s, d = h.shape
        q, k, v = self.qkv(self.norm(h)).view(b, s, 3, 2, d // 2).permute(2, 0, 3, 1, 4)
        seen = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask.bool()[:, None, None, :])
        h = h + self.proj(seen.transpose(1, 2).reshape(b, s, -1))
        return h + self.narrow(torch.relu(self.wide(h)))


def masked_call(rows: int = 4, length: int = 8) -> dict[str, Tensor]:
    mask = torch.ones(rows, length, dtype=torch.long)
    for i in range(rows):
        mask[i, length - i % 3 :] = 0
    return {"input_ids": token_ids(rows, length), "attention_mask": mask}


@pytest.fixture(scope="session")
def resnet() -> Source:
    """Six residual blocks of convolutions: [B, 3, 16, 16] to [B, 10]."""
    return source(built(lambda: plain.CifarResNet(2, 8)), (noise(4, 3, 16, 16),))


@pytest.fixture(scope="session")
def lenet() -> Source:
    """No repeated block: [B, 1, 28, 28] to [B, 10]."""
    return source(built(plain.LeNet), (noise(4, 1, 28, 28),))


@pytest.fixture(scope="session")
def masked() -> Source:
    """Three blocks with a padding mask; one prediction a row."""
    return source(built(Masked), (), masked_call())


@pytest.fixture(scope="session")
def tagger() -> Source:
    """Three blocks with a padding mask; one prediction a position."""
    return source(built(lambda: Masked(positions=True)), (), masked_call())


@pytest.fixture(scope="session")
def sequence_first() -> Source:
    """Between the blocks the batch is on axis 1."""
    return source(built(plain.SequenceFirstEncoder), (token_ids(),))


@pytest.fixture(scope="session")
def cells() -> Source:
    """One LSTM cell called once per step."""
    return source(built(plain.UnrolledLSTMCell), (token_ids(4, 6),))


def code(gm: fx.GraphModule) -> str:
    return str(gm.code)


def targets(gm: fx.GraphModule) -> list[str]:
    return [str(n.target) for n in gm.graph.nodes if n.op == "call_function"]


def same_bits(a: Sequence[Tensor], b: Sequence[Tensor]) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x.isnan(), y.isnan())
        assert torch.equal(torch.nan_to_num(x), torch.nan_to_num(y))
