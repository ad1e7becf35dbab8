"""Multi-exit BERT (DeeBERT, Xin et al. 2020; PABEE, Zhou et al. 2020): MiniLM-L6 on IMDB, a classifier after every block.

A frozen sentence encoder gains nothing with depth on this task, so the trunk is fine-tuned first. The classifiers are
then trained stage by stage (the fine-tuned trunk frozen, as DeeBERT), and from there jointly with it (all losses
together, as PABEE). The one that saves more on rows of the validation part set aside for this choice is calibrated on
the other rows of it, leaving by entropy and by patience with the same weights.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Subset

from eecompile import eecompile
from eecompile.criteria import Criterion, Entropy, Patience
from eecompile.strategies import MeBert
from examples import datasets
from examples._common import Options, Record, Trunk, evaluated, fitted, main, minilm_trunk, observed, rows_of, timed

# Rows of the training part: first the trunk's, then those of the classifiers, then those of the joint training.
ROWS = {"trunk": 4_000, "heads": 4_000, "joint": 2_000, "choice": 1_000, "val": 3_000, "test": 3_000}
ROWS_QUICK = {"trunk": 256, "heads": 256, "joint": 256, "choice": 64, "val": 448, "test": 128}
TRAINING: dict[str, dict[str, Any]] = {
    "staged": {"trunk": False, "epochs": 1, "lr": 1e-3},
    "joint": {"trunk": True, "epochs": 1, "lr": 3e-4, "trunk_lr": 5e-5},
}
HEAD = "mlp"  # over the mean of the real positions: the first token of an early block has seen little of the others
CRITERIA: dict[str, Criterion] = {"entropy": Entropy(), "patience": Patience(exits_in_agreement=4)}


def loaders(quick: bool, seed: int) -> dict[str, DataLoader[Any]]:
    """The rows of IMDB that are used, no row in two of them."""
    rows = ROWS_QUICK if quick else ROWS
    at = {"heads": rows["trunk"], "joint": rows["trunk"] + rows["heads"], "choice": 0, "val": rows["choice"], "test": 0}
    found = {}
    for name, start in at.items():
        part = {"heads": "train", "joint": "train", "choice": "val"}.get(name, name)
        end = start + rows[name]
        last = {"train": at["joint"] + rows["joint"], "val": at["val"] + rows["val"], "test": rows["test"]}[part]
        dataset = Subset(datasets.TokenDataset(datasets.tokens(part, last, standin=quick)), range(start, end))
        order = torch.Generator().manual_seed(seed)
        learnt = part == "train"
        found[name] = DataLoader(dataset, 32 if learnt else 50, shuffle=learnt, generator=order)
    return found


def compiled(model: nn.Module, criterion: Criterion, trunk: bool, example: dict[str, Any]) -> Any:
    strategy = MeBert(head=HEAD, criterion=criterion, distillation=0.5, trunk=trunk)
    return eecompile(model, strategy, example_kwargs={k: v[:4] for k, v in example.items() if k != "labels"})


def trained(
    options: Options, record: Record, trunk: Trunk, parts: dict[str, DataLoader[Any]], some: dict[str, Any]
) -> tuple[Any, str]:
    """Trains both ways; the program of lower cost at 1% of drop on the rows set aside, and how it was trained."""
    programs: dict[str, Any] = {}
    costs: dict[str, float] = {}
    for how, settings in TRAINING.items():
        program = programs[how] = compiled(copy.deepcopy(trunk.model), CRITERIA["entropy"], settings["trunk"], some)
        if how == "joint":  # goes on from the classifiers that were trained alone
            program.heads.load_state_dict(programs["staged"].heads.state_dict())
        loader = parts["joint" if how == "joint" else "heads"]
        settings = settings | ({"epochs": 3, "lr": 5e-3} if options.quick else {})
        bf16 = not options.quick
        fit = fitted(program, loader, f"mebert-imdb-{how}", options, trunk, scheduler="cosine", bf16=bf16, **settings)
        seen = observed(program, {"choice": parts["choice"]})["choice"].of(program)
        costs[how] = seen.calibrate(max_drop=0.01, delta=None).expected_cost
        accuracies = {row.name: row.accuracy_if_all for row in seen.evaluate().rows}
        record.note(**{how: {"fit": fit, "cost_at_choice": costs[how], "accuracy_at_choice": accuracies}})
    best = min(costs, key=lambda how: costs[how])
    record.note(chosen=best)
    return programs[best], best


def example(options: Options, record: Record) -> None:
    """From training to timing."""
    parts = loaders(options.quick, options.seed)
    trunk = minilm_trunk(quick=options.quick, seed=options.seed)
    some = next(iter(parts["val"]))
    record.note(data="IMDB", rows_of_data=ROWS_QUICK if options.quick else ROWS, tokens=datasets.SEQUENCE)
    record.note(model="MiniLM-L6 (all-minilm-l6-v2) with a pooler and a classifier", trunk=trunk.to_dict())
    entropy, how = trained(options, record, trunk, parts, some)
    record.done("train")
    seen = observed(entropy, {part: parts[part] for part in ("val", "test")})
    patience = compiled(entropy.original, CRITERIA["patience"], how == "joint", some)
    patience.heads.load_state_dict(entropy.heads.state_dict())
    variants = []
    for name, program in {"entropy": entropy, "patience": patience}.items():
        variants += evaluated(program, seen, record, f"IMDB, MiniLM-L6, {name}", trunk.accuracy)
    record.done("evaluate")
    timed(record, entropy.original, rows_of(parts["test"], 4), variants, (1, 32), {1: 48, 32: 128}, rounds=7)


if __name__ == "__main__":
    main("mebert_imdb", __doc__, example)
