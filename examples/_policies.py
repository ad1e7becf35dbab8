"""What the self-adaptive examples share: a program with a policy and exits, evaluated as it runs, and the figures kept."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

import torch

from eecompile.training.batches import batches
from examples._common import Record, Variant, alternatives, by_exit
from examples._constant import CLOSED, by_gates
from examples._registry import atomic


def evaluated(fast: Any, loader: Iterable[Any]) -> dict[str, Any]:
    """Accuracy, mean cost, where rows left, which gates were open and at which widths parts ran, as the program runs."""
    right, costs, left, gates, widths = [], [], [], [], []
    with torch.no_grad():
        for batch in batches(loader, torch.device("cpu")):
            result = fast.run(*batch.args, **batch.kwargs)
            right.append(fast.prediction_of(result.output).argmax(-1) == batch.labels)
            costs.append(result.cost)
            left.append(result.exit_index)
            gates.append(result.gates)
            widths += [] if result.widths is None else [result.widths]
    index, opened = torch.cat(left), torch.cat(gates).float()
    names = [*(record.name for record in fast.exits), "end"]
    found = {
        "accuracy": float(torch.cat(right).float().mean()),
        "cost": float(torch.cat(costs).mean()),
        "share": {name: float((index == i).float().mean()) for i, name in enumerate(names)},
        "open": {gate.region: float(share) for gate, share in zip(fast.gates, opened.mean(0), strict=True)},
        "patterns": len(opened.unique(dim=0)),
    }
    if widths:
        mean = torch.cat(widths).mean(0).tolist()
        found["width"] = {width.region: share for width, share in zip(fast.widths, mean, strict=True)}
    return found


def told(
    fast: Any,
    parts: Mapping[str, Any],
    record: Record,
    label: str,
    original_accuracy: float,
    how: str,
    promise: Mapping[str, Any],
    chosen_on: int | None = None,
) -> list[Variant]:
    """The policy as trained with closed exits, and policy and exits as calibrated: a row and a variant each.

    Thresholds are chosen on ``parts["val"]`` as ``promise`` says, which the line calls ``how``; ``parts["test"]`` is run
    once for each line, and for each constant choice, whose gates are chosen on the first ``chosen_on`` batches of
    ``parts["val"]``. All figures are kept next to the weights of `fitted`, so that a second run only measures.
    """
    path = fast.kept_as.with_suffix(".evaluated.json")
    if not path.exists():
        with atomic(path) as written:
            written.write_text(json.dumps(_judge(fast, parts, how, promise, chosen_on)))
    found = json.loads(path.read_text())
    record.note(**{label: {"calibration": found["calibration"], "constant": found["constant"]}})
    variants = []
    for row in found["rows"]:
        exits, gates = row.pop("exit_thresholds"), row["gate_thresholds"]

        def before(exits: list[float] = exits, gates: list[float] = gates) -> None:
            fast.set_thresholds(exits)
            fast.set_gate_thresholds(gates)

        full = {"original_accuracy": original_accuracy, "full_accuracy": found["full_accuracy"]}
        variants.append(Variant(record.row(label, **full, **row), fast, before))
    return variants


def _judge(
    fast: Any, parts: Mapping[str, Any], how: str, promise: Mapping[str, Any], chosen_on: int | None
) -> dict[str, Any]:
    closed = [CLOSED] * len(fast.exits)
    fast.set_thresholds(closed)
    fast.set_gate_thresholds(0.0)
    every = fast.evaluate(parts["test"])
    full = every.full_accuracy
    points = by_exit(fast, [r.accuracy_if_all for r in every.rows])
    points += by_gates(fast, list(islice(parts["val"], chosen_on)), parts["test"])
    fast.set_gate_thresholds(0.5)
    report = fast.calibrate(parts["val"], **promise)
    chosen, gates = fast.thresholds.tolist(), fast.gate_thresholds.tolist()
    rows = []
    for thresholds, exits, opening in (
        ("policy as trained", closed, [0.5] * len(gates)),
        (how, chosen, gates),
    ):
        fast.set_thresholds(exits)
        fast.set_gate_thresholds(opening)
        figures = evaluated(fast, parts["test"])
        told = {"thresholds": thresholds, "exit_thresholds": exits, "gate_thresholds": opening}
        rows.append({**told, **figures, **alternatives(points, figures["cost"])})
    return {"full_accuracy": full, "constant": points, "calibration": report.to_dict(), "rows": rows}
