"""Adaptive computation time over depth, word by word: a small BERT tags the words of code, each for as long as it needs.

The code is generated (`examples/generated.py`): the role of some words is plain, that of others depends on their neighbours,
or on what stands far before them. Every word has a halting unit after each block; one that has halted keeps its state and is
still attended to. Trunk and units are trained together, with a price on steps. The halting threshold is chosen on the
validation part: 1, as trained, and the cheapest that loses at most 1% there against it. What the same number of blocks for
every word gives is shown by models of 1 and 2 blocks, trained as the trunk was.

Steps grow with what a word's role depends on: 1 for an operator, 2 for a function, 3 for a parameter, 4 for the end of a
definition. The trunk makes little of its depth, though: a model of 1 block, trained alone, is as good.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.utils.data import DataLoader

from eecompile import eecompile
from eecompile.strategies import Act
from eecompile.training.batches import batches
from examples import generated
from examples._common import Options, Record, Variant, alternatives, fitted, main, rows_in, rows_of, timed
from examples._constant import Constant
from examples.act_text import evaluated
from examples.datasets import TokenDataset
from examples.generated import IGNORE, TAGS
from examples.trunks import code_trunk

SMALLER, BLOCKS = (1, 2), 4
TRAINING: dict[str, Any] = {"epochs": 4, "lr": 2e-3, "trunk_lr": 5e-4, "max_grad_norm": 1.0, "scheduler": "cosine"}
PRICE = 0.02  # loss that one step is worth


def steps_by_tag(fast: Any, loader: Iterable[Any]) -> dict[str, float]:
    """Mean steps of the words of each role."""
    taken, roles = [], []
    with torch.no_grad():
        for batch in batches(loader, torch.device("cpu")):
            real = batch.labels != IGNORE
            taken.append(fast.run(*batch.args, **batch.kwargs).steps.expand_as(real)[real])
            roles.append(batch.labels[real])
    steps, role = torch.cat(taken).float(), torch.cat(roles)
    return {tag: float(steps[role == k].mean()) for k, tag in enumerate(TAGS)}


def example(options: Options, record: Record) -> None:
    """From training to timing."""
    quick = options.quick
    trunk = code_trunk(quick=quick, seed=options.seed)
    smaller = {layers: code_trunk(layers, quick=quick, seed=options.seed) for layers in (SMALLER[:1] if quick else SMALLER)}
    draw = generated.data(generated.code, quick)
    parts = {}
    for part in generated.SIZES:
        words, tags = draw(part, trunk.recipe.rows if part == "train" else None)
        columns = {"input_ids": words, "attention_mask": (tags != IGNORE).long(), "labels": tags}
        parts[part] = DataLoader(TokenDataset(columns), 32, shuffle=part == "train")
    some = {key: value[:4] for key, value in next(iter(parts["val"])).items() if key != "labels"}
    fast = eecompile(trunk.model, Act(per_token=True, ponder_price=PRICE), example_kwargs=some)
    fit = fitted(fast, parts["train"], "act-code", options, trunk, **{**TRAINING, **({"epochs": 2} if quick else {})})
    sizes = {part: rows_in(loader) for part, loader in parts.items()}
    record.note(data="code, generated", rows_of_data=sizes, price=PRICE, strategy=str(fast.strategy))
    record.note(model=f"BERT, {BLOCKS} blocks 48 wide", trunk=trunk.to_dict(), fit=fit)
    record.done("train")

    found = evaluated(fast, parts)
    block = fast.program.structure.blocks[0].flops / fast.program.total_flops
    constants: list[Constant] = [
        (f"{k} block{'s' * (k > 1)}", 1 - (BLOCKS - k) * block, made.accuracy) for k, made in smaller.items()
    ]
    constants.append((f"{BLOCKS} blocks", 1.0, trunk.accuracy))
    original = code_trunk(quick=quick, seed=options.seed)  # training moved the other one's weights
    record.note(curve_on_val=found["curve_on_val"])
    variants = []
    for how, figures in found["rows"].items():
        row = record.row(
            "code, words halt",
            thresholds=how,
            original_accuracy=original.accuracy,
            full_accuracy=found["full_accuracy"],
            **figures,
            **alternatives(constants, figures["cost"]),
        )
        fast.set_halting_threshold(row["threshold"])
        row["steps_by_tag"] = steps_by_tag(fast, parts["test"])
        variants.append(Variant(row, fast, lambda t=row["threshold"]: fast.set_halting_threshold(t)))
    record.done("evaluate")
    timed(record, original.model, rows_of(parts["test"], 4), variants, (1, 32, 64), {1: 32, 32: 96, 64: 128}, rounds=7)


if __name__ == "__main__":
    main("act_code", __doc__, example)
