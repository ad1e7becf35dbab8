"""Heads of a frozen MiniLM-L6 on reviews of IMDB: fitted on kept features against trained batch by batch, on the same rows.

    python -m tests.bench.heads            # into tests/bench/results/heads.json; fetches data and weights once
    python -m tests.bench.heads --quick    # a stand-in, in seconds, prints only

The encoder is fine-tuned for one epoch first. *batch by batch* is the head of BERT (first token) and two epochs of AdamW at
every exit; *kept features* is what `fit` does by itself. Thresholds lose at most one point on rows of their own.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eecompile import eecompile
from eecompile.strategies import MeBert
from examples import datasets, models

ROWS = {"train": 800, "val": 400, "test": 400}
TOKENS, SIZE = 64, 32
WAYS: dict[str, tuple[MeBert, dict[str, Any]]] = {
    "batch by batch": (MeBert(head="pooler"), {"epochs": 2, "cached": False}),
    "kept features": (MeBert(), {"epochs": 2}),
}
Batches = list[tuple[dict[str, Tensor], Tensor]]


def batches(part: str, quick: bool) -> Batches:
    columns = datasets.tokens(part, 64 if quick else ROWS[part], standin=quick)
    inputs = {name: columns[name][:, :TOKENS].split(SIZE) for name in ("input_ids", "attention_mask")}
    return [({n: p[i] for n, p in inputs.items()}, y) for i, y in enumerate(columns["labels"].split(SIZE))]


def tuned(model: nn.Module, train: Batches) -> float:
    """One epoch of the whole model; seconds."""
    started = time.perf_counter()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    model.train()
    for inputs, labels in train:
        optimizer.zero_grad()
        F.cross_entropy(model(**inputs).logits, labels).backward()
        optimizer.step()
    model.eval()
    return time.perf_counter() - started


def measured(way: str, model: nn.Module, parts: dict[str, Batches]) -> dict[str, Any]:
    strategy, options = WAYS[way]
    fast = eecompile(model, strategy, example_kwargs={n: v[:4] for n, v in parts["test"][0][0].items()})
    wall, cpu = time.perf_counter(), time.process_time()
    fit = fast.fit(parts["train"], seed=0, progress=False, **options)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    calibrated = fast.calibrate(parts["val"], max_drop=0.01, delta=None)
    evaluated = fast.evaluate(parts["test"])
    return {
        "fit": options,
        "fit_seconds": round(wall, 1),
        "fit_cpu_seconds": round(cpu, 1),
        "heads": [e.head_kind for e in fast.exits],
        "chosen": fit.to_dict()["heads"],
        "test_accuracy": {row.name: row.accuracy_if_all for row in evaluated.rows},
        "cost_at_calibration": calibrated.expected_cost,
        "cost": evaluated.mean_cost,
        "accuracy": evaluated.accuracy,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.heads", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="stand-in data and a small model")
    parser.add_argument("--threads", type=int, default=1, help="threads that torch may use (1)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "heads.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    parts = {part: batches(part, options.quick) for part in ROWS}
    model = models.minilm_classifier(datasets.minilm(standin=options.quick), seed=0)
    found: dict[str, Any] = {"command": "python -m tests.bench.heads", "data": "IMDB", "rows": ROWS, "tokens": TOKENS}
    found |= {
        "threads": options.threads,
        "torch": torch.__version__,
        "tuning_seconds": round(tuned(model, parts["train"]), 1),
    }
    for way in WAYS:
        found[way] = measured(way, model, parts)
        print(json.dumps({way: found[way]}, indent=1), file=sys.stderr, flush=True)
    if not options.quick:
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
