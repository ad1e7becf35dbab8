"""Unverified drafts with a bound: the promise over draws of prompts, and what is refused."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from eecompile import CalibrationError, StrategyError, eecompile, strategies
from eecompile.language.risk import NEVER, calibrate_deferred, same_tokens
from tests.language.decoders import decoder, prompts

MAX_DROP, DELTA = 0.2, 0.1
WRONG = {0.9: 0.02, 0.7: 0.12, 0.5: 0.185, 0.3: 0.5}  # share of wrong tokens by threshold


def drawn(seed: int) -> Any:
    """Texts of 20 tokens of which so many are wrong, as `generate` gives them."""
    draw = random.Random(seed)

    def generate(threshold: float, ids: Tensor, mask: Tensor) -> tuple[list[Tensor], list[float]]:
        wrong = WRONG.get(threshold, 0.0)
        texts = [torch.tensor([int(draw.random() < wrong) for _ in range(20)]) for _ in ids]
        return texts, [threshold if threshold < 1 else 1.0] * len(ids)

    return generate


def loader(rows: int) -> list[tuple[Tensor, Tensor]]:
    ids = torch.ones(rows, 4, dtype=torch.int64)
    return [(ids, ids)]


def test_the_bound_holds_as_often_as_promised_and_the_cheapest_is_taken() -> None:
    found = [
        calibrate_deferred(drawn(seed), loader(400), max_drop=MAX_DROP, delta=DELTA, thresholds=list(WRONG), seed=seed)
        for seed in range(60)
    ]
    assert sum(WRONG.get(r.threshold, 0.0) > MAX_DROP for r in found) <= 60 * DELTA
    assert sum(r.threshold == 0.5 for r in found) > 20, "one that keeps the bound narrowly is found"
    assert all(r.qualified and "With probability at least 90%" in r.guarantee for r in found)


def test_without_enough_sequences_nothing_is_drafted() -> None:
    report = calibrate_deferred(drawn(0), loader(6), max_drop=0.05, delta=DELTA, thresholds=list(WRONG))
    assert not report.qualified and report.threshold == NEVER and report.cost == 1
    assert "sequences are needed" in report.guarantee
    assert calibrate_deferred(drawn(0), loader(6), max_drop=0.3, delta=None, thresholds=list(WRONG)).threshold == 0.5


def test_a_decoder_takes_the_threshold_and_keeps_it_after_an_error() -> None:
    chosen = strategies.SelfSpeculative(exit=2, kv="deferred", lookup=0)
    fast: Any = eecompile(decoder("llama"), chosen, example_kwargs=prompts())
    batches = [prompts(8, 9, seed) for seed in range(3)]
    free: dict[str, Any] = {"max_drop": 0.99, "delta": None, "metric": lambda early, full: 1.0}
    report = fast.calibrate(batches, **free, max_new_tokens=6, thresholds=(0.0, 0.05, 0.9))
    assert fast.threshold == report.threshold == min(t["threshold"] for t in report.tried)
    assert report.loss == 0 and report.to_dict()["guarantee"] in str(report)
    assert [t["cost"] for t in report.tried] == sorted((t["cost"] for t in report.tried), reverse=True)
    strict = fast.calibrate(batches, max_drop=0.0, delta=0.1, max_new_tokens=6)
    assert fast.threshold == strict.threshold == NEVER
    with pytest.raises(CalibrationError, match=r"\[0, 1\]"):
        fast.calibrate(batches, metric=lambda early, full: -1.0, max_new_tokens=4)
    assert fast.threshold == NEVER
    for options, said in (({"min_speed": 1.0}, "no such option"), ({"max_dorp": 0.1}, "max_drop")):
        with pytest.raises(StrategyError, match=said):
            fast.calibrate(batches, **options)
    with pytest.raises(CalibrationError, match="out of range"):
        fast.calibrate(batches, max_drop=1.5)
    with pytest.raises(CalibrationError, match="too few sequences"):
        fast.calibrate([prompts(1)], max_new_tokens=2)


def test_the_metric_counts_what_is_missing() -> None:
    assert same_tokens(torch.tensor([1, 2]), torch.tensor([1, 2, 3, 4])) == 0.5
    assert same_tokens(torch.tensor([]), torch.tensor([])) == 0
