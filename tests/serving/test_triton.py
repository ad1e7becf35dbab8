"""The example for Triton's Python backend, with a stand-in for the module that Triton provides."""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from eecompile import CompiledModule

FILE = Path(__file__).parents[2] / "examples" / "triton" / "model.py"
FINAL = 1


class Request:
    """Named arrays, and what is sent back."""

    def __init__(self, **arrays: Any) -> None:
        self.arrays, self.sent = arrays, []

    def get_response_sender(self) -> Any:
        return types.SimpleNamespace(send=lambda response, flags: self.sent.append((response, flags)))


def backend() -> types.ModuleType:
    made = types.ModuleType("triton_python_backend_utils")
    made.TRITONSERVER_RESPONSE_COMPLETE_FINAL = FINAL  # type: ignore[attr-defined]
    made.Tensor = lambda name, value: (name, value)  # type: ignore[attr-defined]
    made.TritonError = str  # type: ignore[attr-defined]
    made.InferenceResponse = lambda tensors=(), error=None: (dict(tensors), error)  # type: ignore[attr-defined]
    made.get_input_tensor_by_name = lambda request, name: types.SimpleNamespace(  # type: ignore[attr-defined]
        as_numpy=lambda: request.arrays[name]
    )
    return made


@pytest.fixture
def model(fast: CompiledModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", backend())
    spec = importlib.util.spec_from_file_location("triton_model", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    fast.save(tmp_path / "1" / "program")
    config = {"input": [{"name": "input"}], "output": [{"name": n} for n in ("scores", "exit_index", "confidence")]}
    made = module.TritonPythonModel()
    made.initialize({"model_config": json.dumps(config), "model_repository": str(tmp_path), "model_version": "1"})
    yield made
    made.finalize()


def test_requests_get_their_own_rows(model: Any, fast: CompiledModule, rows: Tensor, monkeypatch: Any) -> None:
    requests = [Request(input=rows[a:b].numpy()) for a, b in ((0, 1), (1, 6), (6, 40))]
    bad = Request(input=np.zeros((1, 7), np.float32))
    model.execute([*requests, bad])
    with monkeypatch.context() as patch:
        patch.setattr(model.server, "max_queue", 0)
        refused = Request(input=rows[:1].numpy())
        model.execute([refused])
    model.server.close()  # answers what is queued
    wanted = fast.run(rows[:40])
    for request, part in zip(requests, (slice(0, 1), slice(1, 6), slice(6, 40)), strict=True):
        (((tensors, error), flags),) = request.sent
        assert error is None and flags == FINAL
        torch.testing.assert_close(torch.from_numpy(tensors["scores"]), wanted.output[part])
        assert tensors["exit_index"].tolist() == wanted.exit_index[part].tolist()
        torch.testing.assert_close(torch.from_numpy(tensors["confidence"]), wanted.confidence[part])
    (((_, error), flags),) = bad.sent
    assert "input" in error and flags == FINAL
    assert "queue is full" in refused.sent[0][0][1]


def test_the_configuration_names_what_the_example_sends() -> None:
    text = (FILE.parent / "config.pbtxt").read_text()
    assert all(f'name: "{name}"' in text for name in ("x", "scores", "exit_index", "confidence"))
    assert "decoupled: true" in text
