"""Adaptive computation time (Graves 2016): a GRU reads MNIST two rows at a time and ponders up to 3 steps at each.

The reader is trained as usual, one step at each pair of rows. It is then compiled with a halting unit shared by all
pairs and trained on with a price on steps. The halting threshold is chosen on the validation part: the smallest that
loses at most 0.2% there against the trained one. A cost of 1 is one step everywhere, as in the reader as it was.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from eecompile import eecompile
from eecompile.strategies import Act
from examples import datasets, models
from examples._common import Options, Recipe, Record, Variant, fitted, image_data, main, rows_of, timed, trunk

MOST_STEPS = 3
THRESHOLDS = (0.2, 0.4, 0.6, 0.8, 1.0)
LOSS = 0.002
NEVER = 2.0


def at_threshold(fast: Any, loader: DataLoader[Any], threshold: float) -> dict[str, Any]:
    """Accuracy, mean cost, and how many steps were taken in all, on one part at one threshold."""
    fast.set_halting_threshold(threshold)
    right: list[Tensor] = []
    costs: list[Tensor] = []
    steps: Counter[int] = Counter()
    with torch.no_grad():
        for images, labels in loader:
            result = fast.run(images)
            right.append(result.output.argmax(-1) == labels)
            costs.append(result.cost)
            steps.update(result.steps.tolist())
    hits = torch.cat(right).float()
    return {
        "threshold": threshold,
        "accuracy": float(hits.mean()),
        "cost": float(torch.cat(costs).mean()),
        "steps": dict(sorted(steps.items())),
    }


def example(options: Options, record: Record) -> None:
    """From training to timing."""
    quick = options.quick
    recipe = Recipe("reader-mnist", 3, 128, 2e-3, seed=options.seed, rows=20_000)
    if quick:
        recipe = Recipe("reader-mnist-quick", 2, 32, 4e-3, seed=options.seed, standin=True)
    base = trunk(recipe, models.RowReader, image_data("mnist", quick))
    limits = {"train": None if quick else 10_000, "val": None if quick else 4_000, "test": None}
    parts = {
        part: datasets.loader(f"mnist:{part}", standin=quick, seed=options.seed, limit=limits[part])
        for part in datasets.PARTS
    }
    x = next(iter(parts["val"]))[0][:6]
    strategy = Act(max_steps=MOST_STEPS, ponder_price=0.002, halting_bias=0.0)
    fast = eecompile(base.model, strategy, example_inputs=(x,))
    fit = fitted(fast, parts["train"], "act-reader", options, base, epochs=1 if quick else 2, lr=2e-3, trunk_lr=1e-3)
    record.note(data="MNIST", model="a GRU of 96 units, 14 pairs of rows", trunk=base.to_dict(), fit=fit)
    record.done("train")
    curve = [at_threshold(fast, parts["val"], t) for t in THRESHOLDS]
    chosen = min((p for p in curve if p["accuracy"] >= curve[-1]["accuracy"] - LOSS), key=lambda p: p["cost"])
    one_step = at_threshold(fast, parts["test"], NEVER)
    found = at_threshold(fast, parts["test"], chosen["threshold"])
    record.note(steps=MOST_STEPS, curve_on_val=curve, one_step_everywhere=one_step, chosen=found)
    row = record.row(
        f"MNIST, GRU that ponders up to {MOST_STEPS} steps",
        thresholds=f"halting at {chosen['threshold']:g}",
        original_accuracy=base.accuracy,
        full_accuracy=one_step["accuracy"],
        accuracy=found["accuracy"],
        cost=found["cost"],
    )
    record.done("evaluate")
    halting = Variant(row, fast, lambda: fast.set_halting_threshold(chosen["threshold"]))
    timed(record, base.model, rows_of(parts["test"], 2), [halting], (1, 32), {1: 32, 32: 128}, rounds=7)


if __name__ == "__main__":
    main("act_recurrent", __doc__, example)
