"""Self-adaptive inference (AdaViT, Meng et al. 2022): MiniLM-L6 on IMDB, where each review runs its own halves of blocks.

A policy reads the state after the first block once and says which attention and MLP halves of the other five run; four
classifiers let reviews leave before the end. The fine-tuned trunk, policy and classifiers are trained together, the last
halves free to be dropped first, while a quarter of the rows of each batch run everything. Thresholds are chosen on the
validation part, the policy's among a dozen settings that are run; the test part is run once for each line.
"""

from __future__ import annotations

from typing import Any

from eecompile import eecompile
from eecompile.strategies import SelfAdaptive
from examples import datasets
from examples._common import Options, Record, fitted, main, minilm_trunk, rows_of, timed
from examples._parts import imdb_parts
from examples._policies import told

ROWS = {"train": 4_000, "val": 1_000, "test": 2_000}
ROWS_QUICK = {"train": 128, "val": 64, "test": 64}
TRAINING: dict[str, Any] = {"epochs": 2, "lr": 2e-3, "trunk_lr": 5e-5, "max_grad_norm": 1.0}
STRATEGY = SelfAdaptive(exits=4, always_on=("*layer.0*",), target_cost=0.8, curriculum=2, full_share=0.25)
PROMISE = {"max_drop": 0.01, "delta": None}
CHOSEN_ON = 5  # batches of val, for which halves a constant choice drops
STRATEGY_QUICK = SelfAdaptive(exits=1, always_on=("*layer.0*",), target_cost=0.8, curriculum=1)


def example(options: Options, record: Record) -> None:
    """From training to timing."""
    quick = options.quick
    rows = ROWS_QUICK if quick else ROWS
    parts = imdb_parts(rows, quick=quick, seed=options.seed)
    trunk = minilm_trunk(quick=quick, seed=options.seed)
    some = {key: value[:4] for key, value in next(iter(parts["val"])).items() if key != "labels"}
    fast = eecompile(trunk.model, STRATEGY_QUICK if quick else STRATEGY, example_kwargs=some)
    training = {**TRAINING, **({"epochs": 1} if quick else {})}
    fit = fitted(fast, parts["train"], "self-adaptive-imdb", options, trunk, scheduler="cosine", bf16=not quick, **training)
    record.note(data="IMDB", rows_of_data=rows, tokens=datasets.SEQUENCE)
    record.note(model="MiniLM-L6 (all-minilm-l6-v2)", strategy=str(fast.strategy), trunk=trunk.to_dict(), fit=fit)
    record.note(gates=[{"region": g.region, "saves": g.saves} for g in fast.gates])
    record.done("train")
    original = minilm_trunk(quick=quick, seed=options.seed).model  # training moved the other one's weights
    label, how = "IMDB, MiniLM-L6, policy", "at most 1% lost on val"
    variants = told(fast, parts, record, label, trunk.accuracy, how, PROMISE, CHOSEN_ON)
    record.done("evaluate")
    timed(record, original, rows_of(parts["test"], 4), variants, (1, 32, 64), {1: 32, 32: 64, 64: 64}, rounds=7)


if __name__ == "__main__":
    main("self_adaptive_text", __doc__, example)
