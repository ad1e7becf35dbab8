"""Multi-exit BERT (DeeBERT, Xin et al. 2020; PABEE, Zhou et al. 2020): MiniLM-L6 on IMDB, a classifier after every block.

The classifiers are fitted to the fine-tuned trunk as it is (as DeeBERT), and from there trained jointly with it (all losses
together, as PABEE). The one that saves more on rows of the validation part set aside for this choice is calibrated on
the other rows of it, leaving by entropy and by patience with the same weights.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn
from torch.utils.data import DataLoader, Subset

from eecompile import eecompile
from eecompile.criteria import Criterion, Entropy, Patience
from eecompile.strategies import MeBert
from examples import datasets
from examples._common import Options, Record, Trunk, evaluated, fitted, main, minilm_trunk, observed, rows_of, timed
from examples._parts import imdb_parts

ROWS = {"train": 8_000, "choice": 1_000, "val": 4_000, "test": 4_000}
ROWS_QUICK = {"train": 256, "choice": 64, "val": 448, "test": 128}
JOINT: dict[str, Any] = {"epochs": 1, "lr": 3e-4, "trunk_lr": 5e-5, "scheduler": "cosine"}
HEAD = "mlp"  # over the mean of the real positions: the first token of an early block has seen little of the others
CRITERIA: dict[str, Criterion] = {"entropy": Entropy(), "patience": Patience(exits_in_agreement=2)}


def loaders(quick: bool, seed: int) -> dict[str, DataLoader[Any]]:
    """The rows of IMDB that are used, no row in two of them."""
    rows = ROWS_QUICK if quick else ROWS
    held_out = rows["choice"] + rows["val"]
    found = imdb_parts({**rows, "val": held_out}, quick=quick, seed=seed)
    every = found["val"].dataset
    for name, kept in (("choice", range(rows["choice"])), ("val", range(rows["choice"], held_out))):
        found[name] = DataLoader(Subset(every, kept), 50)
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
    for how in ("frozen", "joint"):
        program = programs[how] = compiled(copy.deepcopy(trunk.model), CRITERIA["entropy"], how == "joint", some)
        if how == "joint":  # goes on from the classifiers that were fitted alone
            program.heads.load_state_dict(programs["frozen"].heads.state_dict())
        settings = JOINT if how == "joint" else {"heads": {}}
        fit = fitted(program, parts["train"], f"mebert-imdb-{how}", options, trunk, bf16=not options.quick, **settings)
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
