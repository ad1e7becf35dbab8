"""Random models for property tests: real modules with residual, branching and attention blocks, one or two inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, CLASSES, VOCABULARY, SIDE = 8, 5, 31, 6
KINDS = {
    "vector": ("residual", "branches", "plain", "overwriting"),
    "map": ("residual", "branches", "down", "overwriting"),
    "sequence": ("attention", "mlp", "parallel"),
    "tokens": ("attention", "mlp", "parallel"),
    "second_axis": ("mixing", "mlp"),
}


@dataclass(frozen=True)
class Spec:
    """One model.

    Attributes:
        kind: What comes in: `[B, 8]`, `[B, 3, 12, 12]`, `[B, S, 8]`, ids `[B, S]`, or `[S, B, 8]`.
        blocks: What each block does.
        side: Whether a second input `[B, 6]` is added after every second block.
        masked: Whether there is a padding mask `[B, S]`.
        positions: Whether it predicts per position.
        further: Whether it gives a dictionary with the state of the middle with the scores.
    """

    kind: str
    blocks: tuple[str, ...]
    side: bool = False
    masked: bool = False
    positions: bool = False
    further: bool = False
    seed: int = 0

    def model(self) -> RandomModel:
        """In eval mode; the global generator is left as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return RandomModel(self).eval()

    def call(self, rows: int, length: int, seed: int) -> dict[str, Tensor]:
        """Keyword arguments of one call. Only tokens have a length that may change from call to call."""
        g = torch.Generator().manual_seed(1000 * seed + rows)
        sizes = {
            "vector": (rows, WIDTH),
            "map": (rows, 3, 12, 12),
            "sequence": (rows, 6, WIDTH),
            "second_axis": (6, rows, WIDTH),
        }
        if self.kind == "tokens":
            found = {"x": torch.randint(0, VOCABULARY, (rows, length), generator=g)}
        else:
            found = {"x": torch.randn(sizes[self.kind], generator=g)}
        if self.side:
            found["side"] = torch.randn(rows, SIDE, generator=g)
        if self.masked:
            steps = found["x"].shape[1]
            real = torch.randint(1, steps + 1, (rows, 1), generator=g)
            found["mask"] = (torch.arange(steps) < real).long()
        return found

    @property
    def batch_axis(self) -> Any:
        return {"x": 1, "side": 0} if self.kind == "second_axis" and self.side else int(self.kind == "second_axis")


@st.composite
def specs(draw: st.DrawFn) -> Spec:
    kind = draw(st.sampled_from(sorted(KINDS)))
    blocks = tuple(draw(st.lists(st.sampled_from(KINDS[kind]), min_size=2, max_size=5)))
    long = kind in ("sequence", "tokens")
    return Spec(
        kind=kind,
        blocks=blocks,
        side=draw(st.booleans()),
        masked=long and draw(st.booleans()),
        positions=long and draw(st.booleans()),
        further=draw(st.booleans()),
        seed=draw(st.integers(0, 99)),
    )


class RandomModel(nn.Module):
    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        channels = 3 if spec.kind == "map" else WIDTH
        stem: dict[str, nn.Module] = {"map": nn.Conv2d(3, WIDTH, 3, padding=1), "tokens": nn.Embedding(VOCABULARY, WIDTH)}
        self.stem = stem.get(spec.kind) or nn.Linear(channels, WIDTH)
        make = MapBlock if spec.kind == "map" else VectorBlock if spec.kind == "vector" else SequenceBlock
        self.blocks = nn.ModuleList(make(what) for what in spec.blocks)
        self.second = nn.Linear(SIDE, WIDTH) if spec.side else None
        self.out = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor, side: Tensor | None = None, mask: Tensor | None = None) -> Any:
        h = self.stem(x)
        middle = h
        for k, block in enumerate(self.blocks):
            h = block(h, mask) if mask is not None else block(h)
            if self.second is not None and k % 2 == 0:
                assert side is not None
                h = h + self.wide(self.second(side))
            if k == len(self.blocks) // 2:
                middle = h * 1.0
        scores = self.out(self.pooled(h, mask))
        return {"logits": scores, "middle": middle} if self.spec.further else scores

    def wide(self, s: Tensor) -> Tensor:
        """`[B, D]` in a shape that adds to the state."""
        if self.spec.kind == "map":
            return s[:, :, None, None]
        return {"vector": s, "second_axis": s[None]}.get(self.spec.kind, s[:, None])

    def pooled(self, h: Tensor, mask: Tensor | None) -> Tensor:
        if self.spec.kind == "map":
            return h.mean((2, 3))
        if self.spec.kind == "vector" or self.spec.positions:
            return h
        if mask is None:
            return h.mean(0 if self.spec.kind == "second_axis" else 1)
        real = mask.unsqueeze(-1).to(h.dtype)
        return (h * real).sum(1) / real.sum(1)


class VectorBlock(nn.Module):
    """`[B, D]` to `[B, D]`."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.join = nn.Linear(2 * WIDTH, WIDTH) if what == "branches" else None

    def forward(self, h: Tensor) -> Tensor:
        if self.join is not None:
            return self.join(torch.cat([torch.tanh(self.a(h)), F.silu(self.b(h))], 1))
        if self.what == "residual":
            return h + self.b(F.gelu(self.a(h)))
        if self.what == "overwriting":
            return self.b(F.relu(self.a(h), inplace=True)).add_(h)
        return torch.tanh(self.b(self.a(h)))


class MapBlock(nn.Module):
    """`[B, D, H, W]` to the same, or to half the sides."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        stride = 2 if what == "down" else 1
        self.a = nn.Conv2d(WIDTH, WIDTH, 3, stride, 1, bias=False)
        self.norm = nn.BatchNorm2d(WIDTH)
        self.b = nn.Conv2d(WIDTH, WIDTH, 3, 1, 1)
        self.short = nn.Conv2d(WIDTH, WIDTH, 1, stride)
        nn.init.uniform_(self.norm.running_mean, -0.5, 0.5)
        nn.init.uniform_(self.norm.running_var, 0.5, 2.0)

    def forward(self, h: Tensor) -> Tensor:
        y = self.norm(self.a(h))
        if self.what == "branches":
            return F.relu(torch.cat([y[:, : WIDTH // 2], self.short(h)[:, WIDTH // 2 :]], 1))
        if self.what == "overwriting":
            return F.relu_(self.b(F.relu_(y)) + h)
        return F.relu(self.b(F.relu(y)) + self.short(h))


class SequenceBlock(nn.Module):
    """`[B, S, D]`, or `[S, B, D]` for "mixing", to the same."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH) if what in ("attention", "parallel") else None
        self.mix = nn.Linear(6, 6) if what == "mixing" else None

    def forward(self, h: Tensor, mask: Tensor | None = None) -> Tensor:
        n = self.norm(h)
        if self.mix is not None:
            return h + self.mix(n.transpose(0, -1)).transpose(0, -1)
        mlp = self.down(F.relu(self.up(n)))
        if self.qkv is None:
            return h + mlp
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(n).chunk(3, -1))
        seen = None if mask is None else mask.bool()[:, None, None, :]
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(2)
        return h + attended + mlp if self.what == "parallel" else h + attended
