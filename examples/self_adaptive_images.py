"""Self-adaptive inference (BlockDrop, Wu et al. 2018): ResNet-20 on CIFAR-10, where each image runs its own blocks.

A policy reads the state behind the first block once and says which of the other blocks run that keep their shape; two
branches let images leave before the end. Trunk, policy and branches are trained together, the last blocks free to be
dropped first. Thresholds of policy and branches are chosen on the validation part, the policy's among a dozen settings that
are run; the test part is run once for each line.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from eecompile import eecompile
from eecompile.strategies import SelfAdaptive
from eecompile.training.batches import batches
from examples import datasets
from examples._common import Options, Record, Variant, fitted, main, resnet_trunk, rows_in, rows_of, timed

TRAINING: dict[str, Any] = {"epochs": 8, "lr": 4e-3, "trunk_lr": 2e-4, "max_grad_norm": 5.0}
ROWS = {"train": 15_000, "val": 2_000, "test": 10_000}  # images; of an epoch the same in each
TARGET = 0.65
STRATEGY = SelfAdaptive(exits=2, always_on=("stage1.0",), target_cost=TARGET, curriculum=3)
STRATEGY_QUICK = SelfAdaptive(exits=1, parts=("stage1",), target_cost=0.9, curriculum=1)  # ResNet-8 has no more


def judged(fast: Any, loader: Iterable[Any]) -> dict[str, Any]:
    """Accuracy, mean cost, where rows left and which gates were open, as the program runs."""
    right, costs, left, gates = [], [], [], []
    with torch.no_grad():
        for batch in batches(loader, torch.device("cpu")):
            result = fast.run(*batch.args, **batch.kwargs)
            right.append(result.output.argmax(-1) == batch.labels)
            costs.append(result.cost)
            left.append(result.exit_index)
            gates.append(result.gates)
    index, opened = torch.cat(left), torch.cat(gates).float()
    names = [*(record.name for record in fast.exits), "end"]
    return {
        "accuracy": float(torch.cat(right).float().mean()),
        "cost": float(torch.cat(costs).mean()),
        "share": {name: float((index == i).float().mean()) for i, name in enumerate(names)},
        "open": {gate.region: float(share) for gate, share in zip(fast.gates, opened.mean(0), strict=True)},
        "patterns": len(opened.unique(dim=0)),
    }


def example(options: Options, record: Record) -> None:
    """From training to timing."""
    quick = options.quick
    trunk = resnet_trunk(quick=quick, seed=options.seed)
    parts = {
        part: datasets.loader(
            f"cifar10:{part}",
            limit=None if quick else ROWS[part],
            standin=quick,
            seed=options.seed,
            augmented=part == "train" and not quick,
        )
        for part in datasets.PARTS
    }
    x = next(iter(parts["val"]))[0][:8]
    fast = eecompile(trunk.model, STRATEGY_QUICK if quick else STRATEGY, example_inputs=(x,))
    training = {**TRAINING, **({"epochs": 2} if quick else {})}
    fit = fitted(fast, parts["train"], "self-adaptive-cifar10", options, trunk, scheduler="cosine", **training)
    sizes = {part: rows_in(loader) for part, loader in parts.items()}
    model = "ResNet-8" if quick else "ResNet-20"
    record.note(data="CIFAR-10", rows_of_data=sizes, model=model, strategy=str(fast.strategy), trunk=trunk.to_dict())
    record.note(fit=fit, gates=[{"region": g.region, "saves": g.saves} for g in fast.gates])
    record.done("train")
    label = f"CIFAR-10, {model}"
    closed = [2.0] * len(fast.exits)
    fast.set_thresholds(closed)
    fast.set_gate_thresholds(0.0)
    full = judged(fast, parts["test"])["accuracy"]
    fast.set_gate_thresholds(0.5)
    report = fast.calibrate(parts["val"], max_drop=0.02, delta=None)
    chosen, gates = fast.thresholds.tolist(), fast.gate_thresholds.tolist()
    variants = []
    for how, exits, opening in (
        ("policy as trained", closed, [0.5] * len(gates)),
        ("at most 2% lost on val", chosen, gates),
    ):

        def before(exits: list[float] = exits, opening: list[float] = opening) -> None:
            fast.set_thresholds(exits)
            fast.set_gate_thresholds(opening)

        before()
        figures = judged(fast, parts["test"])
        row = record.row(label, thresholds=how, original_accuracy=trunk.accuracy, full_accuracy=full, **figures)
        variants.append(Variant(row, fast, before))
    record.note(calibration=report.to_dict(), exit_thresholds=chosen, gate_thresholds=gates)
    record.done("judge")
    timed(record, trunk.model, rows_of(parts["test"], 4), variants, (1, 32, 64), {1: 64, 32: 256, 64: 512})


if __name__ == "__main__":
    main("self_adaptive_images", __doc__, example)
