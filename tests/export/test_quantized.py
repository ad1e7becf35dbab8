"""torchao int8: quantize, compile, fit, calibrate, export; quantizing what was calibrated voids its guarantee."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from eecompile import CompiledModule, ExportError, eecompile, strategies
from eecompile.calibration.guarantee import said
from tests.zoo import ZOO

pytestmark = [pytest.mark.nightly, pytest.mark.filterwarnings("ignore:::torchao")]
ENTRY = ZOO["bert"]


def rows(seed: int) -> dict[str, Any]:
    return ENTRY.inputs(64, seed=seed)[1]


def calibrated(quantize: Callable[[torch.nn.Module], None]) -> tuple[torch.nn.Module, CompiledModule]:
    """A small BERT, quantized, with one exit that is fitted to what the model says, and calibrated."""
    model = ENTRY.model()
    quantize(model)
    fast = eecompile(model, strategies.MeBert(exits=("bert.encoder.layer.1",)), example_kwargs=rows(0))
    with torch.no_grad():
        batches = [(rows(k), model(**rows(k)).logits.argmax(-1)) for k in range(4)]
    fast.fit(batches[:2], epochs=1, seed=0)
    fast.calibrate(batches[2:], max_drop=0.5, delta=0.1)
    return model, fast


@pytest.mark.parametrize("config", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def test_a_quantized_model_is_fitted_calibrated_and_exported(config: str, tmp_path: Path) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    _, fast = calibrated(lambda m: torchao.quantize_(m, getattr(torchao, config)()))
    assert "void" not in str(said(fast))
    confidence = fast.observe(**rows(9)).confidences[0]
    fast.set_thresholds(float(confidence.median()))
    if config == "Int8DynamicActivationInt8WeightConfig":  # its operator asks whether one row survives
        with pytest.raises(ExportError, match="could not trace"):
            fast.export(tmp_path / "net.pt2")
        return
    report = fast.verify_export(fast.export(tmp_path / "net.pt2"), [(rows(9), None)], rounds=3)
    assert report.ok, str(report)
    held = torch.export.load(tmp_path / "net.pt2").state_dict.values()
    assert sum(t.dtype == torch.int8 or type(t).__name__ == "Int8Tensor" for t in held) >= 24, "weights are there in int8"


def test_quantizing_what_was_calibrated_voids_the_guarantee() -> None:
    torchao = pytest.importorskip("torchao.quantization")
    model, fast = calibrated(lambda m: None)
    assert "void" not in str(said(fast))
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    assert "The guarantee is void: the weights have changed" in str(said(fast))
