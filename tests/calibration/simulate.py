"""The promise by simulation, and what it costs: `calibrate` against the exact binomial test alone, on the same draws.

python -m tests.calibration.simulate --draws 2000 > tests/bench/results/calibration.json
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eecompile.binomial import log_binomial_tail
from eecompile.calibration.calibrate import RAMP, calibrate
from eecompile.calibration.evidence import Evidence, pattern, remembered
from eecompile.calibration.options import split_sizes, starts
from eecompile.calibration.risk import fallback
from eecompile.calibration.search import Search, candidates
from eecompile.ir.settings import EXITS
from eecompile.training.curve import first_exit
from tests.calibration.synthetic import Drawn, draw, loader

MAX_DROP, DELTA = 0.03, 0.1
POPULATION = 20_000
Data = tuple[Tensor, Tensor]


def no_gains(n: int, seed: int) -> Data:
    """No early answer is right where the full model is wrong."""
    x, y = draw(n, exits=2, seed=seed, skill=3.0)
    wrong = x[:, -1].argmax(1) != y
    x[wrong, :-1] = x[wrong, -1:]
    return x, y


def equal_gains(n: int, seed: int) -> Data:
    """The first exit is nearly as often right as the full model, on other rows."""
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 3, (n,), generator=g)
    signal = torch.nn.functional.one_hot(y, 3)[:, None, :] * torch.tensor([2.3, 2.4, 2.5])[None, :, None]
    return signal + 0.9 * torch.randn(n, 3, 3, generator=g), y


def overlap(n: int, seed: int) -> Data:
    """Sure rows are hardly more often right than others."""
    return draw(n, exits=2, seed=seed, skill=0.8)


def unbalanced(n: int, seed: int) -> Data:
    """One class in twenty rows."""
    x, y = draw(3 * n, exits=2, seed=seed)
    kept = (y > 0) | (torch.rand(3 * n, generator=torch.Generator().manual_seed(seed)) < 0.1)
    return x[kept][:n], y[kept][:n]


def plain(n: int, seed: int) -> Data:
    return draw(n, exits=2, seed=seed)


SHAPES: dict[str, tuple[Callable[[int, int], Data], int]] = {
    "plain, 900 rows": (plain, 900),
    "plain, 300 rows": (plain, 300),
    "plain, 3000 rows": (plain, 3000),
    "losses without gains": (no_gains, 900),
    "gains nearly equal to losses": (equal_gains, 900),
    "heavy overlap": (overlap, 900),
    "unbalanced classes": (unbalanced, 900),
}


def previous(x: Tensor, y: Tensor, seed: int) -> list[float]:
    """Thresholds by the exact binomial test on the loss without gains, a third of the rows for the search."""
    fast = Drawn(exits=2)
    confidences = torch.stack(fast.observe(x).confidences[:-1], 1)
    score = (x.argmax(2) == y[:, None]).double()
    loss = (score[:, -1:] - score).clamp(min=0)
    evidence = Evidence(confidences, loss, remembered(fast.costs))
    order = torch.rand(len(y), generator=torch.Generator().manual_seed(seed), dtype=torch.float64).argsort(stable=True)
    size, _ = split_sizes(len(y), MAX_DROP, DELTA)
    first, test = evidence.part(order[:size]), evidence.part(order[size:])
    most = 1.5 * MAX_DROP + 3 / size
    path = [v for total, _, v in candidates(first, most) if total <= most * size and any(pattern(v))]
    search = Search(first)
    path = ([search.between(search.closed, path[0], share) for share in RAMP] if path else []) + path

    def p_value(i: int) -> float:
        return float(log_binomial_tail(torch.tensor(test.measure(path[i])[0]), test.rows, MAX_DROP).exp())

    found = [search.closed] + [path[i] for i, _ in fallback(p_value, len(path), starts(len(path), DELTA))]
    return min(found, key=lambda v: evidence.measure(v)[1]).tolist()


@dataclass
class Tally:
    """Sums over the draws of one shape and method."""

    violations: int = 0
    cost: float = 0.0
    opened: int = 0


OPTIONS: dict[str, dict[str, Any]] = {
    "marginal": {},
    "conditional": {"conditional": True},
    "group": {"groups": "classes", "control_groups": True},
}


def worst(promise: str, drops: Tensor, index: Tensor, y: Tensor) -> float:
    """The largest mean drop [n] that is promised: of all rows, of those leaving at or before an exit, or of a class."""
    parts = [torch.ones(len(drops), dtype=torch.bool)]
    if promise == "conditional":
        parts += [index <= k for k in range(2)]
    if promise == "group":
        parts += [y == k for k in range(3)]
    return max(float(drops[p].mean()) for p in parts if bool(p.any()))


def simulated(shape: str, draws: int, promise: str = "marginal") -> dict[str, Any]:
    """Violations on a large population and mean cost there; of both methods for the promise that both make."""
    make, rows = SHAPES[shape]
    x, y = make(POPULATION, 10**6)
    fast = Drawn(exits=2)
    confidences, right = torch.stack(fast.observe(x).confidences[:-1], 1), (x.argmax(2) == y[:, None]).double()
    found = {"new": Tally(), **({"previous": Tally()} if promise == "marginal" else {})}
    for seed in range(draws):
        data = make(rows, seed)
        report = calibrate(
            fast, loader(*data), max_drop=MAX_DROP, delta=DELTA, temperature=False, seed=seed, **OPTIONS[promise]
        )
        for name in found:
            thresholds = torch.tensor(report.settings[EXITS] if name == "new" else previous(*data, seed))
            index = first_exit(confidences, thresholds)
            drops = right[:, -1] - right.gather(1, index[:, None])[:, 0]
            found[name].violations += worst(promise, drops, index, y) > MAX_DROP
            found[name].cost += float(fast.costs(pattern(thresholds))[index].mean()) / draws
            found[name].opened += any(pattern(thresholds))
    ratio = {"cost_ratio": round(found["new"].cost / found["previous"].cost, 4)} if "previous" in found else {}
    return {
        "shape": shape,
        "rows": rows,
        "promise": promise,
        "draws": draws,
        **{
            name: {"cost": round(t.cost, 4), "violations": t.violations / draws, "opened": t.opened / draws}
            for name, t in found.items()
        },
        **ratio,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=2000)
    parser.add_argument("--promise", choices=list(OPTIONS), nargs="+", default=["marginal"])
    parser.add_argument("--shape", choices=list(SHAPES), nargs="+", default=list(SHAPES))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    record = {
        "command": shlex.join(["python", "-m", "tests.calibration.simulate", *sys.argv[1:]]),
        "max_drop": MAX_DROP,
        "delta": DELTA,
        "population": POPULATION,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "shapes": [simulated(shape, asked.draws, promise) for promise in asked.promise for shape in asked.shape],
    }
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
