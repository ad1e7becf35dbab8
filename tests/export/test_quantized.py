"""int8 by torchao and by PT2E: quantize, compile, fit, calibrate, export; quantizing what was calibrated voids its
guarantee.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from eecompile import CaptureError, CompiledModule, ExportError, UnsupportedModelError, eecompile, strategies
from eecompile.calibration.guarantee import said
from eecompile.export import TARGETS, verify
from tests.support import close, neutral, run_by
from tests.zoo import ZOO

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.filterwarnings("ignore:::torchao", "ignore:`torch.jit"),
]
ENTRY = ZOO["bert"]


@pytest.fixture(autouse=True)
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "QUICK", 1e9)  # times say nothing on a busy machine


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


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def convolutions(images: torch.Tensor) -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        blocks = [
            m
            for c in (3, 16, 16, 16)
            for m in (torch.nn.Conv2d(c, 16, 3, padding=1), torch.nn.BatchNorm2d(16), torch.nn.ReLU())
        ]
        model = torch.nn.Sequential(
            *blocks, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(16, 10)
        ).eval()
    return pt2e(model, (images,), {})


@pytest.fixture(scope="module")
def fast(convolutions: torch.nn.Module, images: torch.Tensor) -> CompiledModule:
    """Fitted and calibrated, then with thresholds at which rows part ways."""
    made = eecompile(convolutions, strategies.Branchy(exits=2), example_inputs=(images[:4],))
    batches = [(x, torch.arange(16) % 10) for x in images.chunk(4)]
    made.fit(batches[:2], epochs=1, seed=0)
    made.calibrate(batches[2:], max_drop=0.5, delta=0.1)
    assert "void" not in str(said(made))
    made.set_thresholds(1.0)
    confidences = made.observe(images).confidences
    made.set_thresholds([float(c.quantile(0.6)) for c in confidences[:-1]])
    return made


class TestPt2e:
    """A graph that `convert_pt2e` gave is a model like any other."""

    def test_a_weight_is_in_floats_only_where_it_is_read(self, fast: CompiledModule) -> None:
        """PT2E has all of them at the start of its graph: rows would wait for them, and stages hand them on."""
        assert [[v.batch_axis for v in stage.outputs] for stage in fast.program.stages[:-1]] == [[0], [0]]

    def test_executors_are_the_reference(self, fast: CompiledModule, images: torch.Tensor) -> None:
        want = run_by("reference", fast, images)
        assert len(set(want.exit_index.tolist())) > 1
        for executor in ("compact", "simulate"):
            found = run_by(executor, fast, images)
            assert found.exit_index.tolist() == want.exit_index.tolist()
            close(found.output, want.output, 1e-3)  # other sums, which may round to the next integer

    def test_closed_exits_are_the_quantized_model(
        self, fast: CompiledModule, convolutions: torch.nn.Module, images: torch.Tensor
    ) -> None:
        before = fast.settings
        neutral(fast)
        with torch.no_grad():
            close(fast(images), convolutions(images))
        fast.settings = before

    @pytest.mark.parametrize("target", ["pt2", "onnx", "stages"])
    def test_exported(self, target: str, fast: CompiledModule, images: torch.Tensor, tmp_path: Path) -> None:
        if target != "pt2":
            pytest.importorskip("onnxruntime")
        path = fast.export(tmp_path / f"net{TARGETS[target].suffix}", target=target)
        report = fast.verify_export(path, [(images, None)], rounds=3)
        assert report.ok, str(report)
        if target == "onnx":
            import onnx

            from tests.export.test_onnx import graphs

            weights = [w for g in graphs(onnx.load(path).graph) for w in g.initializer if len(w.dims) > 1]
            assert sum(w.data_type == onnx.TensorProto.INT8 for w in weights) >= 5, "weights are there in int8"

    @pytest.mark.parametrize("written", ["net.pt2", "saved"])
    def test_read_where_torchao_is_not_imported(self, written: str, fast: CompiledModule, tmp_path: Path) -> None:
        if written == "saved":
            fast.save(tmp_path / written)
            code = "import eecompile; eecompile.load({!r})"
        else:
            fast.export(tmp_path / written)
            code = "from eecompile.export.runtimes import opened; opened({!r})"
        code = code.format(str(tmp_path / written)) + "; import sys; assert 'torchao' not in sys.modules"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert not done.returncode, done.stderr

    def test_a_scale_of_the_whole_batch_is_refused(self) -> None:
        model, (args, kwargs) = ENTRY.model(), ENTRY.inputs(8, seed=0)
        quantized = pt2e(model, args, kwargs, is_dynamic=True)
        with pytest.raises(UnsupportedModelError, match="one scale for the whole batch"):
            eecompile(quantized, strategies.MeBert(exits=2), example_kwargs=kwargs)

    def test_its_trunk_is_not_trained(self, convolutions: torch.nn.Module, images: torch.Tensor) -> None:
        fast = eecompile(convolutions, strategies.Branchy(exits=1), example_inputs=(images[:4],))
        with pytest.raises(CaptureError, match="no train mode"):
            fast.fit([(images, torch.zeros(64, dtype=torch.int64))], epochs=1, trunk=True)


def pt2e(model: torch.nn.Module, args: Any, kwargs: Any, is_dynamic: bool = False) -> torch.nn.Module:
    """The model in int8, scales taken from one batch."""
    pytest.importorskip("torchao.quantization.pt2e")
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    free = {0: torch.export.Dim.DYNAMIC}
    shapes = dict.fromkeys(kwargs, free) if kwargs else tuple(free for _ in args)
    exported = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config(is_dynamic=is_dynamic))
    prepared = prepare_pt2e(exported.module(), quantizer)
    with torch.no_grad():
        prepared(*args, **kwargs)
    converted: torch.nn.Module = convert_pt2e(prepared)
    return converted
