"""Self-adaptive inference (BlockDrop, Wu et al. 2018): ResNet-20 on CIFAR-10, where each image runs its own blocks.

A policy reads the state after the first block once and says which of the other blocks run that keep their shape; two
branches let images leave before the end. Trunk, policy and branches are trained together, the last blocks free to be
dropped first. A quarter of the rows of each batch run every block: else the trunk learns the policy's choice alone, and the
full model, which calibration compares with, is ruined. Thresholds of policy and branches are chosen on the validation part,
the policy's among a dozen settings that are run; the test part is run once for each line.
"""

from __future__ import annotations

from typing import Any

from eecompile import eecompile
from eecompile.strategies import SelfAdaptive
from examples import datasets
from examples._common import Options, Record, fitted, main, resnet_trunk, rows_in, rows_of, timed
from examples._policies import told

TRAINING: dict[str, Any] = {"epochs": 8, "lr": 4e-3, "trunk_lr": 2e-4, "max_grad_norm": 5.0}
TARGET = 0.65
PROMISE = {"max_drop": 0.02, "delta": None}
ROWS = {"train": 15_000, "val": 2_000, "test": 10_000}  # images; of an epoch the same in each
STRATEGY = SelfAdaptive(exits=2, always_on=("stage1.0",), target_cost=TARGET, curriculum=3, full_share=0.25)
STRATEGY_QUICK = SelfAdaptive(exits=1, parts=("stage1",), target_cost=0.9, curriculum=1)  # ResNet-8 has no more


def example(options: Options, record: Record) -> None:
    """From training to timing."""
    quick = options.quick
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
    training = {**TRAINING, **({"epochs": 2} if quick else {})}
    original = resnet_trunk(quick=quick, seed=options.seed)
    model = "ResNet-8" if quick else "ResNet-20"
    sizes = {part: rows_in(loader) for part, loader in parts.items()}
    record.note(data="CIFAR-10", rows_of_data=sizes, model=model, trunk=original.to_dict())
    trunk = resnet_trunk(quick=quick, seed=options.seed)  # training moves its weights
    fast = eecompile(trunk.model, STRATEGY_QUICK if quick else STRATEGY, example_inputs=(x,))
    fit = fitted(fast, parts["train"], "self-adaptive-cifar10", options, trunk, scheduler="cosine", **training)
    record.note(strategy=str(fast.strategy), fit=fit, gates=[{"region": g.region, "saves": g.saves} for g in fast.gates])
    record.done("train")
    variants = told(fast, parts, record, f"CIFAR-10, {model}, policy", original.accuracy, "at most 2% lost on val", PROMISE)
    record.done("evaluate")
    timed(record, original.model, rows_of(parts["test"], 4), variants, (1, 32, 64), {1: 64, 32: 256, 64: 512})


if __name__ == "__main__":
    main("self_adaptive_images", __doc__, example)
