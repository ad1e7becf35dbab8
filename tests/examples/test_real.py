"""The way of the examples on the real thing, cut short: MNIST from its package to thresholds that hold on the test part."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch.utils.data import DataLoader

from eecompile.strategies import Branchy
from examples import datasets, models
from examples._common import Options, Recipe, Record, evaluated, fitted, image_data, observed, rows_of, timed, trunk
from tests.support import compiled as eecompile


@pytest.mark.data
@pytest.mark.nightly
def test_b_lenet_on_mnist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EECOMPILE_RUNS", str(tmp_path / "runs"))
    options = Options(out=tmp_path)
    recipe = Recipe("lenet-short", 2, 64, 4e-3, rows=12_000)
    made = trunk(recipe, models.LeNet, image_data("mnist", False))
    assert made.accuracy > 0.97
    train = datasets.loader("mnist:train", batch_size=64, limit=12_000)
    held_out: dict[str, DataLoader[object]] = {part: datasets.loader(f"mnist:{part}") for part in ("val", "test")}
    x = next(iter(held_out["val"]))[0][:8]
    fast = eecompile(made.model, Branchy(exits=("relu", "relu_1"), trunk=True), example_inputs=(x,))
    fitted(fast, train, "lenet-short", options, made, epochs=2, lr=4e-3, trunk_lr=1e-3, scheduler="cosine")
    record = Record("short", options)
    variants = evaluated(fast, observed(fast, held_out), record, "MNIST", made.accuracy)
    timed(record, made.model, rows_of(held_out["test"], 2), variants, (32,), rounds=3)
    guaranteed, empirical = record.rows
    assert guaranteed["calibration"]["qualified"]
    assert guaranteed["full_accuracy"] - guaranteed["accuracy"] <= 0.01
    assert empirical["full_accuracy"] - empirical["accuracy"] <= 0.015
    for row in record.rows:
        assert row["cost"] < 0.6  # most digits leave behind the first convolution
        assert row["share"]["exit_0"] > 0.4
        assert row["speedup"]["32"] > 0
    replayed = observed(fast, held_out)["test"].of(fast).evaluate()
    again = fast.evaluate(held_out["test"])  # what was kept gives what running again gives, up to rounding
    assert replayed.accuracy == pytest.approx(again.accuracy, abs=3e-4)
    assert replayed.mean_cost == pytest.approx(again.mean_cost, abs=1e-3)
    assert [row.share for row in replayed.rows] == pytest.approx([row.share for row in again.rows], abs=1e-3)
