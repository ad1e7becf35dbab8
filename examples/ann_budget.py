"""An anytime neural network under a budget: MSDNet on Fashion-MNIST, AdaLoss (Hu et al. 2019) against equal weights.

A small multi-scale dense network is trained from scratch together with its auxiliary predictors, once with each loss
weighted by the inverse of its running mean and once with equal weights. Then two curves on the test part: the accuracy
when no image may cost more than a budget (anytime prediction), and when images share a budget (budgeted batch
classification), with thresholds chosen on the validation part, once by search and once from MSDNet's quota.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from eecompile import eecompile
from eecompile.calibration.budget import budget_curve
from eecompile.strategies import Ann
from examples import datasets
from examples._common import (
    Observed,
    Options,
    Recipe,
    Record,
    Trunk,
    Variant,
    alternatives,
    by_exit,
    fitted,
    main,
    observed,
    rows_in,
    rows_of,
    timed,
)
from examples.msdnet import MSDNet

ROWS, EPOCHS = 20_000, 5
Rows = list[tuple[torch.Tensor, torch.Tensor]]
NAMES = {"adaloss": "AdaLoss", "fixed": "equal weights"}
SHOWN = (0.13, 0.15, 0.2)  # in the README's table; the record has all
BUDGETS = (0.13, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.85, 1.0)


def untrained(options: Options) -> Trunk:
    """The network as it is before any training, which `fit` does together with its predictors."""
    torch.manual_seed(options.seed)
    model = MSDNet(layers=6, width=8, growth=4, channels=1) if options.quick else MSDNet(channels=1)
    recipe = Recipe("msdnet-fashion_mnist", 0, 128, 0.0, seed=options.seed, standin=options.quick)
    return Trunk(model.eval(), 0.1, 0.1, 0.0, recipe.path, recipe)


def together(fast: Any, val: Observed, test: Observed) -> tuple[Any, Rows, Rows]:
    """One replay of both parts, and a loader of row numbers for each."""
    both = Observed(torch.cat([val.outputs, test.outputs]), torch.cat([val.labels, test.labels]))
    rows = torch.arange(len(both.labels))
    n = len(val.labels)
    return both.of(fast), *([(i, both.labels[i]) for i in r.split(1024)] for r in (rows[:n], rows[n:]))


def example(options: Options, record: Record) -> None:
    """Both ways to weight the losses, from training to the curves."""
    quick = options.quick
    parts = {
        part: datasets.loader(
            f"fashion_mnist:{part}", batch_size=32 if quick else 128, limit=None if quick or part != "train" else ROWS,
            standin=quick, seed=options.seed,
        )
        for part in datasets.PARTS
    }  # fmt: skip
    x = next(iter(parts["val"]))[0][:8]
    programs: dict[str, Any] = {}
    for balance in ("adaloss", "fixed"):
        trunk = untrained(options)
        strategy = Ann(head="mlp", balance=balance)
        fast = programs[balance] = eecompile(trunk.model, strategy, example_inputs=(x,))
        fit = fitted(
            fast,
            parts["train"],
            f"ann-msdnet-{balance}",
            options,
            trunk,
            epochs=2 if quick else EPOCHS,
            lr=4e-3,
            trunk_lr=4e-3,
            scheduler="cosine",
        )
        record.note(**{balance: {"fit": fit, "exits": [[e.cut, e.depth, e.head_cost] for e in fast.exits]}})
    record.note(rows={part: rows_in(loader) for part, loader in parts.items()})
    record.done("train")
    variants: dict[str, list[Variant]] = {balance: [] for balance in programs}
    for balance, fast in programs.items():
        seen = observed(fast, {part: parts[part] for part in ("val", "test")})
        replay, val, test = together(fast, seen["val"], seen["test"])
        fast.set_thresholds(1.0)
        curves = {method: budget_curve(replay, val, test, budgets=BUDGETS, method=method) for method in ("search", "quota")}
        degraded = seen["test"].of(fast).evaluate(budgets=True).degradation
        record.note(**{f"{balance}_curves": {"no image above": degraded, **{m: c.to_dict() for m, c in curves.items()}}})
        points = by_exit(fast, seen["test"].right().float().mean(0).tolist())
        names = [*(e.name for e in fast.exits), "model"]
        for point in curves["search"].points:
            if point["budget"] in SHOWN:
                held_out = point["test"]
                row = record.row(
                    f"MSDNet, Fashion-MNIST, {NAMES[balance]}",
                    thresholds=f"budget {point['budget']:.0%}",
                    full_accuracy=curves["search"].full_accuracy["test"],
                    accuracy=held_out["accuracy"],
                    cost=held_out["cost"],
                    share=dict(zip(names, held_out["share"], strict=True)),
                    **alternatives(points, held_out["cost"]),
                )
                variants[balance].append(Variant(row, fast, setting(fast, point["thresholds"])))
    record.done("evaluate")
    x = rows_of(parts["test"], 4)
    for balance, fast in programs.items():
        timed(record, fast.original, x, variants[balance], (1, 32, 256))


def setting(fast: Any, thresholds: list[float]) -> Callable[[], None]:
    """Sets these thresholds, and the temperatures that they were chosen at."""
    temperatures = fast.temperatures.tolist()

    def before() -> None:
        fast.set_thresholds(thresholds)
        fast.set_temperatures(temperatures)

    return before


if __name__ == "__main__":
    main("ann_budget", __doc__, example)
