"""What decides whether a row goes into a region: gate units, chosen by the shape of the value there.

A unit is called with the value `x` that comes in and, where it is a masked sequence, its mask `[B, S]`; it gives a score
`[B]` in [0, 1], the probability that the region is worth running. Units start out open: the bias of the last layer is
`open_bias`, so that training begins with the model as it was (SkipNet, Wang et al. 2018).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from eecompile.heads import Site, as_data, fitting, from_data, mean_over_positions

OPEN_BIAS = 2.0
HIDDEN = 10  # of the recurrent gate, as in the paper


class GateUnit(nn.Module):
    """Base of the units that belong to one gate.

    Args:
        site: Where the unit reads; `site.classes` is not used.
        open_bias: Bias of the score's logit.
    """

    kind: ClassVar[str] = ""
    fits: ClassVar[tuple[str, ...]] = ("map", "sequence", "vector")
    recurrent: ClassVar[bool] = False  # takes and gives a state with the score
    common: ClassVar[bool] = False  # one unit gives the scores of all gates, [B, G]

    def __init__(self, site: Site, open_bias: float = OPEN_BIAS) -> None:
        super().__init__()
        self.site, self.open_bias = site, open_bias

    def pooled(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """`[B, width]`: the mean over positions."""
        if self.site.kind == "map":
            return x.mean((2, 3))
        if self.site.kind == "sequence":
            return mean_over_positions(self.site.sequence(x), mask)
        return x

    @property
    def options(self) -> dict[str, Any]:
        """Further arguments, as JSON data."""
        return {"open_bias": self.open_bias}

    def forward(self, x: Tensor, mask: Tensor | None = None, *state: Tensor) -> Any:
        raise NotImplementedError


def opening(layer: nn.Linear, bias: float) -> nn.Linear:
    """A last layer whose score starts near sigmoid(bias) for every input."""
    with torch.no_grad():
        layer.weight.mul_(0.1)
        layer.bias.fill_(bias)
    return layer


class LinearGate(GateUnit):
    """Mean over positions, one linear layer, sigmoid."""

    kind = "linear"

    def __init__(self, site: Site, open_bias: float = OPEN_BIAS) -> None:
        super().__init__(site, open_bias)
        self.norm: nn.Module = nn.LayerNorm(site.width) if site.kind == "sequence" else nn.Identity()
        self.score = opening(nn.Linear(site.width, 1), open_bias)

    def forward(self, x: Tensor, mask: Tensor | None = None, *state: Tensor) -> Tensor:
        return torch.sigmoid(self.score(self.norm(self.pooled(x, mask)))).squeeze(-1)


class TokenGate(GateUnit):
    """One score for every position of a sequence, `[B, S]`: norm, one linear layer, sigmoid."""

    kind = "token"
    fits = ("sequence",)

    def __init__(self, site: Site, open_bias: float = OPEN_BIAS) -> None:
        super().__init__(site, open_bias)
        self.norm = nn.LayerNorm(site.width)
        self.score = opening(nn.Linear(site.width, 1), open_bias)

    def forward(self, x: Tensor, mask: Tensor | None = None, *state: Tensor) -> Tensor:
        found = torch.sigmoid(self.score(self.norm(x))).squeeze(-1)
        # Padding is done at once: it must not keep its row running.
        return found if mask is None else torch.where(mask.bool(), found, 1.0)


class Halve(nn.Module):
    """The largest value of every 2 x 2 pixels, as `MaxPool2d(2, ceil_mode=True)` gives it."""

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda:
            return nn.functional.max_pool2d(x, 2, ceil_mode=True)
        # The pooling operator of the CPU also finds where they are, which takes 10 to 50 times as long.
        height, width = x.shape[-2:]
        if height % 2 or width % 2:
            x = nn.functional.pad(x, (0, width % 2, 0, height % 2), mode="replicate")
        rows = torch.maximum(x[:, :, ::2], x[:, :, 1::2])
        return torch.maximum(rows[..., ::2], rows[..., 1::2])


class ConvGate(GateUnit):
    """The feed-forward gate of SkipNet (FFGate-II): pool, a strided 3x3 convolution, pool, linear, sigmoid."""

    kind = "conv"
    fits = ("map",)

    def __init__(self, site: Site, open_bias: float = OPEN_BIAS) -> None:
        super().__init__(site, open_bias)
        self.shrink = Halve()
        self.conv = nn.Conv2d(site.width, HIDDEN, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(HIDDEN)
        self.score = opening(nn.Linear(HIDDEN, 1), open_bias)

    def forward(self, x: Tensor, mask: Tensor | None = None, *state: Tensor) -> Tensor:
        h = torch.relu(self.norm(self.conv(self.shrink(x))))
        return torch.sigmoid(self.score(h.mean((2, 3)))).squeeze(-1)


class RecurrentGate(GateUnit):
    """The recurrent gate of SkipNet (RNNGate): a projection of its own, an LSTM cell shared by all gates.

    Args:
        shared: The cell and the last layer, `RecurrentCore`; the same object for every gate.
    """

    kind = "recurrent"
    recurrent = True

    def __init__(self, site: Site, open_bias: float = OPEN_BIAS, shared: RecurrentCore | None = None) -> None:
        super().__init__(site, open_bias)
        self.project = nn.Linear(site.width, HIDDEN)
        self.shared = shared if shared is not None else RecurrentCore(open_bias)

    def forward(self, x: Tensor, mask: Tensor | None = None, *state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        v = torch.relu(self.project(self.pooled(x, mask)))
        h, c = self.shared.cell(v, state if state else None)
        return torch.sigmoid(self.shared.score(h)).squeeze(-1), h, c


class RecurrentCore(nn.Module):
    """What the recurrent gates of one model share."""

    def __init__(self, open_bias: float = OPEN_BIAS) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(HIDDEN, HIDDEN)
        self.score = opening(nn.Linear(HIDDEN, 1), open_bias)


class PolicyGate(GateUnit):
    """One policy for all gates, from one early value: pool, a hidden layer, one sigmoid per gate (BlockDrop, Wu et al.
    2018; AdaViT, Meng et al. 2022). Scores `[B, G]`."""

    kind = "policy"
    common = True

    def __init__(self, site: Site, open_bias: float = OPEN_BIAS, gates: int = 1, hidden: int | None = None) -> None:
        super().__init__(site, open_bias)
        self.gates, self.hidden_size = gates, hidden or max(16, min(site.width, 128))
        self.norm: nn.Module = nn.LayerNorm(site.width) if site.kind == "sequence" else nn.Identity()
        self.hidden = nn.Linear(self._features(), self.hidden_size)
        self.score = opening(nn.Linear(self.hidden_size, gates), open_bias)

    def _features(self) -> int:
        return self.site.width * 4 if self.site.kind == "map" else self.site.width

    def features(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Pooled value; of a map its mean over each quarter, because one mean says little of an early map."""
        if self.site.kind == "map":
            return torch.nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)
        return self.pooled(x, mask)

    def logits(self, x: Tensor, mask: Tensor | None) -> Tensor:
        found: Tensor = self.score(torch.relu(self.hidden(self.norm(self.features(x, mask)))))
        return found

    @property
    def options(self) -> dict[str, Any]:
        return {"open_bias": self.open_bias, "gates": self.gates, "hidden": self.hidden_size}

    def forward(self, x: Tensor, mask: Tensor | None = None, *state: Tensor) -> Tensor:
        return torch.sigmoid(self.logits(x, mask))


class DepthGate(PolicyGate):
    """Depth chosen up front (Elbayad et al. 2020): a multinomial over 0..G, how many gated regions to run.

    Score of gate i is P(depth > i), so scores fall with i, and at threshold 0.5 a row runs to the median depth. A
    hidden layer and a softmax; it starts near full depth.
    """

    kind = "depth"

    def __init__(self, site: Site, open_bias: float = OPEN_BIAS, gates: int = 1, hidden: int | None = None) -> None:
        super().__init__(site, open_bias, gates, hidden)
        self.score = opening(nn.Linear(self.hidden_size, gates + 1), 0.0)
        with torch.no_grad():
            self.score.bias[-1] = open_bias

    def forward(self, x: Tensor, mask: Tensor | None = None, *state: Tensor) -> Tensor:
        probability = torch.softmax(self.logits(x, mask).float(), -1)
        return (1 - probability.cumsum(-1)[:, :-1]).clamp(0, 1).to(x.dtype)


class Norm(nn.Module):
    """The numbers of one batch norm; the graph says how they are used."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.running_mean: Tensor
        self.running_var: Tensor
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))


class WidthNorms(nn.Module):
    """Batch norms of the widths below the full one (switchable batch norm of Yu et al. 2019).

    A graph reads their tensors by path, `levels.WIDTH.NORM.weight`, and keeps those alone when it is copied: not this class.

    Args:
        sizes: For each width the channels of its norms, in graph order.
    """

    kind: ClassVar[str] = "norms"

    def __init__(self, sizes: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.levels = nn.ModuleList(nn.ModuleList(Norm(n) for n in level) for level in sizes)


def norms_at(norms: nn.Module, width: int) -> list[Norm]:
    """The norms of one width in graph order: of `WidthNorms`, or what a graph has kept of it."""
    level = norms.get_submodule(f"levels.{width}")
    return [cast(Norm, level.get_submodule(str(i))) for i in range(len(list(level.children())))]


KINDS = (LinearGate, TokenGate, ConvGate, RecurrentGate, PolicyGate, DepthGate)
UNITS: dict[str, type[GateUnit]] = {u.kind: u for u in KINDS}


def unit_class(kind: str, site: Site, where: str) -> type[GateUnit]:
    """The unit with this name, "auto" for the best that fits.

    Raises:
        StrategyError: Unknown, or it does not take a value of this shape.
    """
    if kind == "auto":
        kind = "conv" if site.kind == "map" else "linear"
    return fitting("gate unit", UNITS, kind, site, where)


def describe(unit: nn.Module) -> dict[str, Any]:
    """The unit as JSON data."""
    if isinstance(unit, GateUnit):
        return as_data(unit)
    widths = range(len(list(unit.get_submodule("levels").children())))
    return {"kind": WidthNorms.kind, "sizes": [[len(norm.weight) for norm in norms_at(unit, k)] for k in widths]}


def rebuild(data: dict[str, Any], shared: RecurrentCore | None = None) -> GateUnit | WidthNorms:
    """The inverse of `describe`; weights are loaded afterwards. Recurrent units share `shared`."""
    if data["kind"] == WidthNorms.kind:
        return WidthNorms(data["sizes"])
    return from_data(UNITS, data, **({"shared": shared} if UNITS[data["kind"]].recurrent else {}))
