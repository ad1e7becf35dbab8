"""A strategy tried on a sample: heads fitted over the frozen model, and the cheapest thresholds for a drop.

Intervals are percentiles over draws of the validation rows with replacement (the bootstrap); each draw chooses its own
thresholds among those on the front of drop against cost.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from eecompile.advice.sample import Clock, Sample
from eecompile.api import eecompile
from eecompile.calibration.calibrate import Exits
from eecompile.calibration.evidence import Evidence, pattern
from eecompile.calibration.options import Options
from eecompile.calibration.search import Search, candidates
from eecompile.errors import StrategyError
from eecompile.ir.settings import CLOSED, EXITS, Settings
from eecompile.training.head_report import cut_short

if TYPE_CHECKING:
    from eecompile.module import CompiledModule

HEADS, SEARCH = 0.55, 0.7  # of the budget, where fitting heads and the search for thresholds end
DRAWS = 200
INTERVAL = (0.05, 0.95)


@dataclass(frozen=True)
class Point:
    """Settings of a probe, and what they do on the validation rows.

    Attributes:
        max_drop: Most that may be lost.
        cost: Mean fraction of the model's FLOPs; `low` and `high` are its interval of 90%.
        drop: Mean score lost.
        exits: Names of the exits that are open.
    """

    max_drop: float
    settings: Settings
    cost: float
    low: float
    high: float
    drop: float
    exits: tuple[str, ...]


@dataclass(frozen=True)
class Probe:
    """A strategy on a sample.

    Attributes:
        points: One for each drop that may be lost.
        constant: The same for one exit for all rows.
        cut: What was cut short, in words.
    """

    name: str
    fast: CompiledModule
    points: list[Point]
    constant: list[Point]
    cut: list[str] = field(default_factory=list)


def probe(name: str, models: Any, sample: Sample, drops: tuple[float, ...], options: dict[str, Any], clock: Clock) -> Probe:
    """Compiles, fits heads on most of the sample and chooses thresholds on the rest, each until its share of the time is up.

    Raises:
        EecompileError: The strategy does not fit the model, or its heads cannot be fitted over kept features.
    """
    inputs, _ = sample.fit[0]
    given = {"example_kwargs": inputs} if isinstance(inputs, dict) else {"example_inputs": inputs}
    fast = eecompile(models, name, **given, **options)
    if not fast.exits:
        raise StrategyError("no exit fits", where=name)
    cut: list[str] = []
    if isinstance(models, nn.Module):
        heads = {"trunk": False, "cached": True, "progress": False, "seed": options["seed"]}
        cut += cut_short(fast.fit(sample.fit, **heads, seconds=clock.until(HEADS)).heads)
    exits = Exits(fast, sample.val_items, fast.settings, Options(delta=None, seed=options["seed"]))
    data, evidence = exits.evidence(exits.collected(True), math.inf)
    found = replace(evidence, loss=data.score[:, -1:] - data.score)
    names = [e.name for e in fast.exits]

    def point(vectors: list[Tensor], most: float) -> Point:
        return _point(found, exits.settings, names, vectors, most, options["seed"])

    chosen = []
    for i, most in enumerate(drops):
        search = Clock(clock.until(SEARCH) / (len(drops) - i))
        chosen.append(point(_front(found, most, search.over), most))
        if search.over():
            cut.append(f"the search for thresholds at {most:.0%} stopped before its end")
    return Probe(name, fast, chosen, [point(_constant(found), most) for most in drops], cut)


def _front(drops: Evidence, most: float, late: Callable[[], bool] = lambda: False) -> list[Tensor]:
    """Threshold vectors on the front of drop against cost, past the drop that is asked for as well."""
    found = [vector for _, _, vector in candidates(drops, 2 * most, late)]
    if drops.recompute is None:
        search, budget = Search(drops, late), most * drops.rows
        best = [v for v in found if search.measure(v)[0] <= budget + 1e-9]
        found.append(search.descend(best[-1] if best else search.closed, None, budget))
    return found


def _constant(drops: Evidence) -> list[Tensor]:
    """Each exit for all rows, and the model's own end."""
    alone = [torch.full((drops.exits,), CLOSED) for _ in range(drops.exits + 1)]
    for k in range(drops.exits):
        alone[k][k] = 0.0
    return alone


def _point(drops: Evidence, settings: Settings, names: list[str], vectors: list[Tensor], most: float, seed: int) -> Point:
    """The cheapest vector that loses at most so much; with none, the one that loses least."""
    n = drops.rows
    index = torch.stack([drops.leave(v) for v in vectors])
    lost = drops.loss.gather(1, index.T).T
    cost = torch.stack([drops.costs(pattern(v))[i] for v, i in zip(vectors, index, strict=True)])

    def cheapest(loss: Tensor, price: Tensor) -> Tensor:
        """Index of the vector, by mean loss and mean price `[..., V]`."""
        price = torch.where(loss <= most + 1e-9, price, price.max() + 1 + loss)
        return price.argmin(-1)

    generator = torch.Generator().manual_seed(seed)
    weights = torch.zeros(DRAWS, n, dtype=torch.float64)
    drawn = torch.randint(n, (DRAWS, n), generator=generator)
    weights.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
    losses, costs = weights @ lost.T / n, weights @ cost.double().T / n
    # What is chosen on some rows loses more on others: by how much, rows that a draw left out tell.
    others = (weights == 0).double()
    elsewhere = others @ lost.T / others.sum(1, keepdim=True)
    first = cheapest(losses, costs)[:, None]
    bias = max(0.0, float((elsewhere - losses).gather(1, first).mean()))
    chosen = int(cheapest(lost.mean(1) + bias, cost.mean(1)))
    drawn_costs = costs.gather(1, cheapest(losses + bias, costs)[:, None])[:, 0]
    low, high = torch.quantile(drawn_costs, torch.tensor(INTERVAL, dtype=torch.float64)).tolist()
    is_open = pattern(vectors[chosen])
    return Point(
        max_drop=most,
        settings=settings.with_values(EXITS, vectors[chosen].tolist()),
        cost=float(cost[chosen].mean()),
        low=low,
        high=high,
        drop=float(lost[chosen].mean()),
        exits=tuple(name for name, o in zip(names, is_open, strict=True) if o),
    )
