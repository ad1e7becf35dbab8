"""SkipNet (Wang et al. 2018): ResNet-20 on CIFAR-10, a gate on every residual block whose shape stays the same.

Seven of nine blocks may be skipped; the two that halve the map are always run. First blocks are dropped by chance, so that
the trunk learns to do without them; then gates and trunk are trained together with hard gates, and once more from where
that ended, at a lower rate, while the price of a FLOP is steered towards the target cost. A quarter of the rows of each
batch run every block: else a block that nearly every row skips is trained for no other, and the full model, which
calibration compares with, is ruined. An epoch is a fresh draw of rows from the training part. The trunk as it was before,
trained to the end, is the original.
"""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from eecompile import CompiledModule, eecompile
from eecompile.strategies import SkipNet
from examples._common import Options, Record, Variant, accuracy, fitted, main, resnet_trunk, rows_in, rows_of, timed
from examples._constant import alternatives, by_gates
from examples._parts import cifar_parts

ROWS, ROWS_QUICK = 10_240, 96  # of an epoch
HELD_OUT = {"val": 4000, "test": 4000}
CHOSEN_ON = 12  # batches of val, for which gates a constant choice closes
SIZES = (1, 64)
FITS: dict[str, dict[str, Any]] = {
    "skipnet-resnet": {
        "strategy": {"target_cost": 0.65, "shares": (0, 1, 0), "warm_up": 0.5},
        "fit": {"epochs": 20, "lr": 1e-2, "trunk_lr": 1e-3},
    },
    "skipnet-resnet-again": {
        "strategy": {"target_cost": 0.69, "shares": (0, 1, 0)},
        "fit": {"epochs": 8, "lr": 2e-3, "trunk_lr": 5e-4},
    },
}
PROMISES: dict[str, dict[str, Any] | None] = {
    "as trained": None,  # a gate opens from a score of 0.5
    "guaranteed": {"max_drop": 0.02, "delta": 0.05},
}


def example(options: Options, record: Record) -> None:
    """From training to timing."""
    quick = options.quick
    trunk = resnet_trunk(quick=quick, seed=options.seed)
    train, held_out = cifar_parts(ROWS_QUICK if quick else ROWS, HELD_OUT, quick=quick, seed=options.seed)
    x: Tensor = next(iter(held_out["val"]))[0][:8]
    fits: dict[str, Any] = {}
    learned: dict[str, Tensor] = {}
    for name, settings in FITS.items():
        strategy = SkipNet(open_bias=1.0, full_share=0.25, **settings["strategy"])
        fast = eecompile(trunk.model.to(memory_format=torch.channels_last), strategy, example_inputs=(x,))
        if learned:
            fast.load_state_dict(learned)
        fits[name] = fitted(fast, train, name, options, trunk, scheduler="cosine", **settings["fit"])
        learned = fast.state_dict()
    fast.to(memory_format=torch.contiguous_format)
    sizes = {"train": rows_in(train)} | {part: rows_in(loader) for part, loader in held_out.items()}
    model = f"{type(trunk.model).__name__}, {sum(p.numel() for p in trunk.model.parameters()):,} parameters"
    record.note(data="CIFAR-10", rows_of_data=sizes, model=model, trunk=trunk.to_dict(), fit=fits)
    record.done("train")
    original = resnet_trunk(quick=quick, seed=options.seed).model  # training moved the other one's weights
    original_accuracy = accuracy(original, held_out["test"])
    points = by_gates(fast, list(islice(held_out["val"], CHOSEN_ON)), held_out["test"])
    record.note(constant=points)
    variants = []
    for name, promise in PROMISES.items():
        report = None if promise is None else fast.calibrate(held_out["val"], **promise)
        row, variant = evaluated(fast, held_out["test"], record, name, report, original_accuracy)
        row |= alternatives(points, row["cost"])
        variants.append(variant)
    record.done("evaluate")
    timed(record, original, rows_of(held_out["test"], 2), variants, SIZES)


def evaluated(
    fast: CompiledModule, test: DataLoader[Any], record: Record, name: str, report: Any, original_accuracy: float
) -> tuple[dict[str, Any], Variant]:
    """A line of the record for the gates' thresholds as they are."""
    judgement = fast.evaluate(test)
    blocks = sum(b.flops for b in fast.program.structure.blocks) / fast.program.total_flops
    row = record.row(
        "stand-in for CIFAR-10, ResNet-8, gates" if record.options.quick else "CIFAR-10, ResNet-20, gates",
        thresholds=name,
        original_accuracy=original_accuracy,
        full_accuracy=judgement.full_accuracy,
        accuracy=judgement.accuracy,
        cost=judgement.mean_cost,
        share={g.name: g.open for g in judgement.gates},
        skipped_of_blocks=sum(g.saved for g in judgement.gates) / blocks,
        guarantee=None if report is None else report.guarantee,
        calibration=None if report is None else report.to_dict(),
        evaluation=judgement.to_dict(),
    )
    thresholds = fast.gate_thresholds.tolist()
    return row, Variant(row, fast, lambda: fast.set_gate_thresholds(thresholds))


if __name__ == "__main__":
    main("skipnet_cifar", __doc__, example)
