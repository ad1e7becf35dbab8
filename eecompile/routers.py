"""What estimates where a row should go: router units, chosen by the shape of the value that they read.

A unit is called with the value and, where it is a masked sequence, its mask `[B, S]`; it gives `[B, K]` float32, the
probability of each of K routes, the model's own way last. A row whose scores are not numbers goes that way: nothing is
left out on a guess.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from eecompile.heads import Site, fitting, mean_over_positions


class RouterUnit(nn.Module):
    """Base of the units.

    Args:
        site: Where the unit reads; `site.classes` is not used.
        routes: How many there are.
        bias: Logit of the last one that training starts near.
    """

    kind: ClassVar[str] = ""
    fits: ClassVar[tuple[str, ...]] = ("map", "sequence", "vector")

    def __init__(self, site: Site, routes: int, bias: float = 0.0) -> None:
        super().__init__()
        self.site, self.routes, self.bias = site, routes, bias

    @property
    def options(self) -> dict[str, Any]:
        """Further arguments, as JSON data."""
        return {"routes": self.routes, "bias": self.bias}

    def pooled(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """`[B, features]`: a sequence's mean over its positions, a map's over each quarter."""
        if self.site.kind == "map":
            return torch.nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)
        if self.site.kind == "sequence":
            return mean_over_positions(self.site.sequence(x), mask)
        return x

    @property
    def features(self) -> int:
        return self.site.width * (4 if self.site.kind == "map" else 1)

    def last(self, width: int) -> nn.Linear:
        """A last layer that starts near 0, and near `bias` for the last route."""
        layer = nn.Linear(width, self.routes)
        with torch.no_grad():
            layer.weight.mul_(0.1)
            layer.bias.zero_()
            layer.bias[-1] = self.bias
        return layer

    def logits(self, x: Tensor, mask: Tensor | None) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        found = torch.softmax(self.logits(x, mask).float(), -1)
        lost = found.isnan().any(-1, keepdim=True)
        own_way = torch.zeros_like(found).index_fill(-1, torch.full((1,), self.routes - 1, device=found.device), 1.0)
        return torch.where(lost, own_way, found)


class LinearRouter(RouterUnit):
    """Pool, normalise where it is a sequence, one linear layer."""

    kind = "linear"

    def __init__(self, site: Site, routes: int, bias: float = 0.0) -> None:
        super().__init__(site, routes, bias)
        self.norm: nn.Module = nn.LayerNorm(site.width) if site.kind == "sequence" else nn.Identity()
        self.score = self.last(self.features)

    def logits(self, x: Tensor, mask: Tensor | None) -> Tensor:
        found: Tensor = self.score(self.norm(self.pooled(x, mask)))
        return found


class MLPRouter(RouterUnit):
    """Pool, normalise where it is a sequence, one hidden layer."""

    kind = "mlp"

    def __init__(self, site: Site, routes: int, bias: float = 0.0) -> None:
        super().__init__(site, routes, bias)
        hidden = max(16, min(site.width, 128))
        self.norm: nn.Module = nn.LayerNorm(site.width) if site.kind == "sequence" else nn.Identity()
        self.hidden = nn.Linear(self.features, hidden)
        self.score = self.last(hidden)

    def logits(self, x: Tensor, mask: Tensor | None) -> Tensor:
        found: Tensor = self.score(torch.relu(self.hidden(self.norm(self.pooled(x, mask)))))
        return found


class ConvRouter(RouterUnit):
    """Two strided 3x3 convolutions, a hidden layer on the means of the map's quarters: it also reads a raw image."""

    kind = "conv"
    fits = ("map",)

    def __init__(self, site: Site, routes: int, bias: float = 0.0) -> None:
        super().__init__(site, routes, bias)
        layers: list[nn.Module] = []
        for taken, given in ((site.width, 16), (16, 24)):
            layers += [nn.Conv2d(taken, given, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(given), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.hidden = nn.Linear(24 * 4, 32)
        self.score = self.last(32)

    def logits(self, x: Tensor, mask: Tensor | None) -> Tensor:
        h = torch.nn.functional.adaptive_avg_pool2d(self.body(x), 2).flatten(1)
        found: Tensor = self.score(torch.relu(self.hidden(h)))
        return found


UNITS: dict[str, type[RouterUnit]] = {u.kind: u for u in (LinearRouter, MLPRouter, ConvRouter)}


def unit_class(kind: str, site: Site, where: str) -> type[RouterUnit]:
    """The unit with this name, "auto" for the best that fits.

    Raises:
        StrategyError: Unknown, or it does not take a value of this shape.
    """
    if kind == "auto":
        kind = "conv" if site.kind == "map" else "mlp"
    hint = "at= names a cut whose value the router can read; eecompile inspect MODEL shows them"
    return fitting("router unit", UNITS, kind, site, where, hint=hint)
