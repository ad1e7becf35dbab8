"""What the self-adaptive examples share: a program with a policy and exits, judged as it runs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from eecompile.training.batches import batches
from examples._common import Inputs, Record, Variant, timed

CLOSED = 2.0
ALLOWED = 0.02


def judged(fast: Any, loader: Iterable[Any]) -> dict[str, Any]:
    """Accuracy, mean cost, where rows left and which gates were open, as the program runs."""
    right, costs, left, gates = [], [], [], []
    with torch.no_grad():
        for batch in batches(loader, torch.device("cpu")):
            result = fast.run(*batch.args, **batch.kwargs)
            right.append(fast.prediction_of(result.output).argmax(-1) == batch.labels)
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


def told(fast: Any, parts: dict[str, Any], record: Record, label: str, original_accuracy: float) -> list[Variant]:
    """The policy as trained with closed exits, and policy and exits as calibrated: a row and a variant each.

    Thresholds are chosen on ``parts["val"]``, so that at most `ALLOWED` is lost there; ``parts["test"]`` is run once
    for each line.
    """
    closed = [CLOSED] * len(fast.exits)
    fast.set_thresholds(closed)
    fast.set_gate_thresholds(0.0)
    full = judged(fast, parts["test"])["accuracy"]
    fast.set_gate_thresholds(0.5)
    report = fast.calibrate(parts["val"], max_drop=ALLOWED, delta=None)
    chosen, gates = fast.thresholds.tolist(), fast.gate_thresholds.tolist()
    record.note(calibration=report.to_dict(), exit_thresholds=chosen, gate_thresholds=gates)
    variants = []
    for how, exits, opening in (
        ("policy as trained", closed, [0.5] * len(gates)),
        (f"at most {ALLOWED:.0%} lost on val", chosen, gates),
    ):

        def before(exits: list[float] = exits, opening: list[float] = opening) -> None:
            fast.set_thresholds(exits)
            fast.set_gate_thresholds(opening)

        before()
        figures = judged(fast, parts["test"])
        row = record.row(label, thresholds=how, original_accuracy=original_accuracy, full_accuracy=full, **figures)
        variants.append(Variant(row, fast, before))
    return variants


def measured(record: Record, original: nn.Module, inputs: Inputs, variants: list[Variant], rows: dict[int, int]) -> None:
    """Times the variants at the batch sizes of ``rows``, which says how many rows each takes."""
    record.done("judge")
    timed(record, original, inputs, variants, tuple(rows), rows)
