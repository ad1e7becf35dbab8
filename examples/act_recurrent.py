"""Adaptive computation time on the tasks of its paper (Graves 2016): parity, addition and logic, with a recurrent network.

Of each task it is known how hard a row is: how many signs, digits or operations it has. A GRU cell that reads the row again
at each of 6 steps learns the task with all 6 for every row. It is then compiled with a halting unit after each step and
trained on with a price on steps. The halting threshold is the trained one, and one that calibration chooses: at most 1 point
lost with 95% confidence. Compared are networks of 1, 2 and 4 steps, trained as the one of 6 was: *constant* and *random* are
the best of these. Steps should grow with difficulty: the rank correlation is Spearman's, over the rows of the test part.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from eecompile import CompiledModule, eecompile
from eecompile.strategies import Act
from examples import generated
from examples._common import Options, Record, Variant, alternatives, fitted, main, timed
from examples._constant import Constant
from examples.generated import TASKS
from examples.trunks import thinker_trunk

STEPS, FEWER = 6, (1, 2, 4)
ROWS = {"train": 60_000, "val": 3_000, "test": 6_000}
ROWS_QUICK = {"train": 2_000, "val": 400, "test": 400}
PRICE = 0.006  # loss that one step is worth
TRAINING: dict[str, Any] = {"epochs": 6, "lr": 2e-3, "trunk_lr": 1e-3, "max_grad_norm": 1.0, "scheduler": "cosine"}
PROMISE = {"max_drop": 0.01, "delta": 0.05}


def ranks(values: Tensor) -> Tensor:
    """float64 [N]: ranks, equal values at the mean of theirs."""
    _, index, count = values.unique(return_inverse=True, return_counts=True)
    last = count.cumsum(0).double()
    return (last - (count - 1) / 2)[index]


def at_threshold(fast: CompiledModule, x: Tensor, labels: Tensor, difficulty: Tensor) -> dict[str, Any]:
    """Accuracy, mean cost and steps, as the program runs."""
    with torch.no_grad():
        result = fast.run(x)
    assert result.steps is not None
    steps, levels = result.steps, difficulty.unique().tolist()
    right = (result.output.argmax(-1) == labels).float()
    related = torch.corrcoef(torch.stack((ranks(steps), ranks(difficulty))))[0, 1]
    return {
        "accuracy": float(right.mean()),
        "cost": float(result.cost.mean()),
        "share": {f"{k} steps": float((steps == k).float().mean()) for k in range(1, STEPS + 1)},
        "rank_correlation": float(related.nan_to_num()),
        "steps_by_difficulty": {k: float(steps[difficulty == k].float().mean()) for k in levels},
        "accuracy_by_difficulty": {k: float(right[difficulty == k].mean()) for k in levels},
    }


def example(options: Options, record: Record) -> None:
    """From training to timing."""
    quick, seed = options.quick, options.seed
    rows = ROWS_QUICK if quick else ROWS
    record.note(data="parity, addition, logic (generated)", rows_of_data=rows, price=PRICE)
    record.note(model="a GRU of 96 units, 6 steps")
    found: dict[str, Any] = {}
    for task, draw in TASKS.items():
        x, labels, _ = draw(rows["train"], list(generated.SIZES).index("train"))
        original = thinker_trunk(task, STEPS, quick=quick, seed=seed)
        fewer = {k: thinker_trunk(task, k, quick=quick, seed=seed) for k in FEWER[: 1 if quick else None]}
        trunk = thinker_trunk(task, STEPS, quick=quick, seed=seed)  # training moves its weights
        fast = eecompile(trunk.model, Act(ponder_price=PRICE), example_inputs=(x[:4],))
        loader = DataLoader(TensorDataset(x, labels), 256, shuffle=True, generator=torch.Generator().manual_seed(seed))
        training = {**TRAINING, **({"epochs": 1} if quick else {})}
        fit = fitted(fast, loader, f"act-{task}", options, trunk, **training)
        found[task] = (fast, original, fewer)
        record.note(**{task: {"trunk": original.to_dict(), "strategy": str(fast.strategy), "fit": fit}})
    record.done("train")

    for task, (fast, original, fewer) in found.items():
        val, test = (TASKS[task](rows[part], list(generated.SIZES).index(part)) for part in ("val", "test"))
        step = fast.program.structure.blocks[0].flops / fast.program.total_flops
        constants: list[Constant] = [(f"{k} steps", 1 - (STEPS - k) * step, made.accuracy) for k, made in fewer.items()]
        constants.append((f"{STEPS} steps", 1.0, original.accuracy))
        variants = []
        for how, promise in {"as trained": None, "guaranteed": PROMISE}.items():
            report = None if promise is None else fast.calibrate([(val[0], val[1])], **promise)
            figures = at_threshold(fast, *test)
            threshold = float(fast.halting_threshold)
            row = record.row(
                f"{task}, GRU of {STEPS} steps",
                thresholds=how,
                threshold=threshold,
                original_accuracy=original.accuracy,
                **figures,
                **alternatives(constants, figures["cost"]),
                guarantee=None if report is None else report.guarantee,
                calibration=None if report is None else report.to_dict(),
            )
            variants.append(Variant(row, fast, lambda t=threshold, fast=fast: fast.set_halting_threshold(t)))
        found[task] = (original.model, test[0], variants)
    record.done("evaluate")
    for model, inputs, variants in found.values():
        timed(record, model, inputs, variants, (1, 32, 256), {1: 64, 32: 256, 256: 2048})


if __name__ == "__main__":
    main("act_recurrent", __doc__, example)
