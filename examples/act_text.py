"""Adaptive computation time over depth (Graves 2016): MiniLM-L6 on IMDB stops block by block, per review and per token.

A halting unit after each block says how likely the state is good enough. The fine-tuned trunk and the units are trained
together, twice. Reviews stop as a whole, after the block that the classifier is to read (PonderNet: the expected loss over
where a review stops; by ACT, at the price that tokens pay, they never do). Tokens stop one by one: each keeps the mean of
its states, weighted by its scores, and is attended to as before (ACT: the loss with a price on steps). Halting thresholds
are chosen on the validation part: as trained, and the cheapest that loses at most 1% there against all blocks. The test
part is run once for each line. What the same depth for all reviews gives is shown by the model cut to 3 blocks, trained as
the trunk was.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from eecompile import eecompile
from eecompile.strategies import Act
from eecompile.training.batches import batches
from examples import datasets
from examples._common import Options, Record, Variant, alternatives, fitted, main, minilm_trunk, rows_of, timed
from examples._constant import Constant
from examples._parts import imdb_parts
from examples._registry import atomic
from examples.generated import IGNORE
from examples.stages import alone, text_stages

ROWS = {"train": 4_000, "val": 1_000, "test": 2_000}
ROWS_QUICK = {"train": 128, "val": 64, "test": 64}
TRAINING: dict[str, Any] = {"epochs": 1, "lr": 2e-3, "trunk_lr": 5e-5, "max_grad_norm": 1.0, "scheduler": "cosine"}
HALTING = {
    "reviews": Act(halting="pondernet", prior=0.5, beta=0.3),
    "tokens": Act(per_token=True, ponder_price=0.003),
}
NEVER = 2.0
THRESHOLDS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, NEVER)
ALLOWED = 0.01


def at_threshold(fast: Any, loader: Iterable[Any], threshold: float) -> dict[str, Any]:
    """Accuracy, mean cost, and the share of reviews (or of their tokens) that took 1, 2, ... steps, as the program runs."""
    fast.set_halting_threshold(threshold)
    right, costs, steps = [], [], []
    with torch.no_grad():
        for batch in batches(loader, torch.device("cpu")):
            result = fast.run(*batch.args, **batch.kwargs)
            real = batch.labels != IGNORE
            right.append((fast.prediction_of(result.output).argmax(-1) == batch.labels)[real])
            costs.append(result.cost)
            taken = result.steps
            # padding halts at once: only tokens count
            steps.append(taken if taken.ndim == 1 else taken[batch.kwargs["attention_mask"].expand_as(taken).bool()])
    most = len(fast.program.choices.chains[0].steps)
    taken = torch.cat(steps)
    return {
        "threshold": threshold,
        "accuracy": float(torch.cat(right).float().mean()),
        "cost": float(torch.cat(costs).mean()),
        "share": {f"{k} blocks": float((taken == k).float().mean()) for k in range(1, most + 1)},
        "mean_steps": float(taken.float().mean()),
    }


def cheapest(curve: Sequence[dict[str, Any]]) -> float:
    """The threshold of the least cost that loses at most `ALLOWED` against the last one, which halts last."""
    able = [p for p in curve if p["accuracy"] >= curve[-1]["accuracy"] - ALLOWED]
    return float(min(able, key=lambda p: p["cost"])["threshold"])


def evaluated(fast: Any, parts: dict[str, Any]) -> dict[str, Any]:
    """The curve on the validation part, and what the test part gives as trained, as chosen and without halting: kept."""
    path = fast.kept_as.with_suffix(".evaluated.json")
    if not path.exists():
        trained = float(fast.halting_threshold)
        curve = [at_threshold(fast, parts["val"], t) for t in THRESHOLDS]
        asked = {"as trained": trained, f"at most {ALLOWED:.0%} lost on val": cheapest(curve)}
        found = {how: at_threshold(fast, parts["test"], threshold) for how, threshold in asked.items()}
        full = at_threshold(fast, parts["test"], NEVER)["accuracy"]
        with atomic(path) as written:
            written.write_text(json.dumps({"curve_on_val": curve, "rows": found, "full_accuracy": full}))
    made: dict[str, Any] = json.loads(path.read_text())
    return made


def example(options: Options, record: Record) -> None:
    """From training to timing."""
    quick = options.quick
    rows = ROWS_QUICK if quick else ROWS
    parts = imdb_parts(rows, quick=quick, seed=options.seed)
    some = {key: value[:4] for key, value in next(iter(parts["val"])).items() if key != "labels"}
    record.note(data="IMDB", rows_of_data=rows, tokens=datasets.SEQUENCE, allowed=ALLOWED)
    *_, half, whole = text_stages(quick=quick, seed=options.seed)
    constants: list[Constant] = alone([half, whole], some)
    programs = {}
    for who, strategy in HALTING.items():
        trunk = minilm_trunk(quick=quick, seed=options.seed)  # each program trains its own
        fast = programs[who] = eecompile(trunk.model, strategy, example_kwargs=some)
        fit = fitted(fast, parts["train"], f"act-imdb-{who}", options, trunk, bf16=not quick, **TRAINING)
        record.note(**{who: {"strategy": str(fast.strategy), "fit": fit}})
    record.note(model="MiniLM-L6 (all-minilm-l6-v2)", trunk=trunk.to_dict())
    record.done("train")
    variants = []
    for who, fast in programs.items():
        found = evaluated(fast, parts)
        record.note(**{f"{who}_on_val": found["curve_on_val"]})
        for how, figures in found["rows"].items():
            row = record.row(
                f"IMDB, MiniLM-L6, {who} halt",
                thresholds=how,
                original_accuracy=trunk.accuracy,
                full_accuracy=found["full_accuracy"],
                **figures,
                **alternatives(constants, figures["cost"]),
            )
            variants.append(Variant(row, fast, lambda t=row["threshold"], fast=fast: fast.set_halting_threshold(t)))
    record.done("evaluate")
    original = minilm_trunk(quick=quick, seed=options.seed).model  # training moved the other ones' weights
    timed(record, original, rows_of(parts["test"], 4), variants, (1, 32, 64), {1: 32, 32: 64, 64: 64}, rounds=7)


if __name__ == "__main__":
    main("act_text", __doc__, example)
