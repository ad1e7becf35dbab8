"""Autocast, half precision and mixed dtypes: the model's own numbers and dtypes, whatever leaves where, or a refusal."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from eecompile import CaptureError, EecompileError, load, strategies
from tests.random_models import specs
from tests.support import CLOSED, both, equal_bits, executor, random_thresholds, spreading_thresholds, tensors
from tests.support import compiled as eecompile
from tests.test_properties import bounded

LOW = [torch.bfloat16, torch.float16]
Step = Callable[[Tensor, nn.Module], Tensor]


class Chain(nn.Module):
    """`[B, 8]` to `[B, 4]` through four layers; `step` says what a layer does, `end` what becomes of the logits."""

    def __init__(self, step: Step, end: Callable[[Tensor], Tensor] = lambda y: y) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 32), nn.Linear(32, 4)
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(4))
        self.step, self.end = step, end

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = self.step(x, layer)
        return self.end(self.last(x))


def without_autocast(x: Tensor, layer: nn.Module) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return layer(x.float()).relu()


def with_autocast(x: Tensor, layer: nn.Module) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h = layer(x)
    return x + h


def masked(x: Tensor, layer: nn.Module) -> Tensor:
    h = layer(x)
    return x + h.masked_fill(h < -0.5, torch.finfo(h.dtype).min).softmax(-1)


def plain(x: Tensor, layer: nn.Module) -> Tensor:
    return layer(x).relu()


RIGHT = {
    "plain": Chain(plain),
    "a float32 residual": Chain(lambda x, layer: x.float() + layer(x)),
    "float logits": Chain(plain, lambda y: y.float()),
    "log-probabilities": Chain(plain, lambda y: F.log_softmax(y, -1)),
    "type_as": Chain(lambda x, layer: F.layer_norm(layer(x).float(), (32,)).type_as(x)),
    "a region without autocast": Chain(without_autocast),
    "a region with autocast": Chain(with_autocast),
}
READS_DTYPES = {
    "finfo": Chain(masked),
    "to the dtype of another": Chain(lambda x, layer: layer(x).float().sin().to(x.dtype) * 1.001),
    "a constant like another": Chain(lambda x, layer: plain(x, layer) + torch.ones(32, dtype=x.dtype) / 3),
    "the state of autocast": Chain(lambda x, layer: plain(x, layer) * (2 if torch.is_autocast_enabled("cpu") else 1)),
}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def compiled(model: nn.Module, x: Tensor, exits: int = 2):
    return eecompile(model.eval(), strategies.Branchy(exits=exits), example_inputs=(x,))


def agree(fast, model: nn.Module, x: Tensor) -> None:
    """Closed the model's bits; open the same rows, numbers and dtypes in both executors, also where all rows leave."""
    with torch.no_grad():
        want = model(x)
        fast.set_thresholds(CLOSED)
        for name in ("compact", "reference"):
            with executor(fast, name):
                equal_bits(fast(x), want)
        seen = fast.observe(x).confidences
        for thresholds in (spreading_thresholds(seen[:-1]), 0.0):
            fast.set_thresholds(thresholds)
            compact, reference = both(fast, x)
            assert torch.equal(compact.exit_index, reference.exit_index)
            assert compact.output.dtype == reference.output.dtype == want.dtype
            torch.testing.assert_close(compact.output, reference.output)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("kind", RIGHT)
def test_under_autocast(kind: str, dtype: torch.dtype) -> None:
    model, x = RIGHT[kind], torch.randn(32, 8)
    fast = compiled(model, x)
    with torch.autocast("cpu", dtype=dtype):
        agree(fast, model, x)
    agree(fast, model, x)  # and outside of it again


@pytest.mark.parametrize("kind", READS_DTYPES)
def test_code_that_reads_dtypes_is_refused_under_autocast(kind: str) -> None:
    model, x = READS_DTYPES[kind], torch.randn(32, 8)
    fast = compiled(model, x)
    agree(fast, model, x)
    for training in (False, True):
        fast.train(training)
        refused = pytest.raises(CaptureError, match="under autocast to bfloat16 the captured graph is not the model")
        with refused, torch.autocast("cpu", dtype=torch.bfloat16):
            fast.run(x)


def test_a_model_compiled_under_autocast_is_right_outside_of_it() -> None:
    model, x = RIGHT["a float32 residual"], torch.randn(32, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fast = compiled(model, x)
    agree(fast, model, x)


@pytest.mark.parametrize("dtype", [*LOW, torch.float64])
@pytest.mark.parametrize("kind", ["plain", "float logits"])
def test_models_in_other_dtypes(kind: str, dtype: torch.dtype, tmp_path) -> None:
    model = Chain(RIGHT[kind].step, RIGHT[kind].end).to(dtype)
    x = torch.randn(32, 8).to(dtype)
    fast = compiled(model, x)
    agree(fast, model, x)
    fast.set_thresholds(spreading_thresholds(fast.observe(x).confidences[:-1]))
    fast.save(tmp_path / "program")
    loaded = load(tmp_path / "program")
    assert {p.dtype for p in loaded.parameters()} == {p.dtype for p in fast.parameters()} == {dtype}
    equal_bits(loaded(x), fast(x))


@pytest.mark.parametrize("kind", ["plain", "a float32 residual", "float logits"])
def test_gradients_in_train_mode_under_autocast(kind: str) -> None:
    model, x = RIGHT[kind], torch.randn(16, 8)
    fast = compiled(model, x).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = fast.run(x)
        loss = fast.loss(result, torch.randint(0, 4, (16,)))
        want = model(x)
    assert {o.dtype for o in result.outputs} == {want.dtype}
    equal_bits(result.outputs[-1].detach(), want.detach())
    loss.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in fast.head_parameters())


def test_calibrate_and_fit_under_autocast() -> None:
    x, y = torch.randn(64, 8), torch.randint(0, 4, (64,))
    fast = compiled(RIGHT["float logits"], x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fast.fit([(x, y)], epochs=1)
        fast.calibrate([(x, y)], delta=None)
        compact, reference = both(fast, x)
    assert torch.equal(compact.exit_index, reference.exit_index)


def test_prepared_by_accelerate() -> None:
    model, x = RIGHT["plain"], torch.randn(32, 8)
    fast = compiled(model, x)
    fast.set_thresholds(CLOSED)
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        accelerator = Accelerator(cpu=True, mixed_precision="bf16")
        mine, own = accelerator.prepare(fast), accelerator.prepare(Chain(plain))
        own.load_state_dict(model.state_dict())
        with torch.no_grad():
            equal_bits(mine(x), own.eval()(x))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_a_device_program_is_refused_under_autocast() -> None:
    x = torch.randn(8, 8)
    fast = compiled(RIGHT["plain"], x)
    fast.executor = "simulate"
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(EecompileError, match="autocast"):
        fast(x)


def test_a_saved_program_keeps_what_was_compared(tmp_path) -> None:
    model, x = RIGHT["float logits"], torch.randn(32, 8)
    fast = compiled(model, x)
    fast.set_thresholds(CLOSED)
    fast.save(tmp_path / "before")
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        fast(x)
        fast.save(tmp_path / "after")
        equal_bits(load(tmp_path / "after")(x), model(x))
        with pytest.raises(CaptureError, match="cannot be checked without its model"):
            load(tmp_path / "before")(x)


@pytest.mark.parametrize(
    ("dtype", "change"), [(torch.float32, "half"), (torch.float32, "double"), (torch.bfloat16, "float")]
)
def test_another_dtype_afterwards_is_refused(dtype: torch.dtype, change: str) -> None:
    model, x = Chain(plain).to(dtype), torch.randn(8, 8).to(dtype)
    fast = compiled(model, x)
    with pytest.raises(EecompileError, match="keeps the dtype that it was captured in"):
        getattr(fast, change)()
    assert {p.dtype for p in model.parameters()} == {dtype}
    equal_bits(fast.full(x), model(x).detach())


@pytest.mark.parametrize(("model", "example"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_an_example_in_another_dtype(model: torch.dtype, example: torch.dtype) -> None:
    with pytest.raises(CaptureError, match="itself fails on the example"):
        compiled(Chain(plain).to(model), torch.randn(8, 8).to(example))


@bounded(8)
@given(spec=specs(), dtype=st.sampled_from(LOW), rows=st.integers(2, 9), seed=st.integers(0, 999))
def test_random_models_under_autocast(spec, dtype: torch.dtype, rows: int, seed: int) -> None:
    model = spec.model()
    options = {"prediction": "logits"} if spec.further else {}
    example = spec.call(4, 6, seed=0)
    fast = eecompile(model, strategies.Branchy(exits=2), example_kwargs=example, batch_axis=spec.batch_axis, **options)
    fast.set_thresholds(CLOSED)
    call = spec.call(rows, 6, seed)
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
        if spec.masked and not spec.positions:  # `mask.to(h.dtype)`, which may be refused
            with contextlib.suppress(CaptureError):
                equal_bits(fast(**call), model(**call))
            return
        got, want = fast(**call), model(**call)
        for a, b in zip(tensors(got), tensors(want), strict=True):
            equal_bits(a, b)
        seen = fast.observe(**call).confidences
        fast.set_thresholds(random_thresholds(seen[:-1], random.Random(seed)))
        compact, reference = both(fast, **call)
        assert torch.equal(compact.exit_index, reference.exit_index)
        for a, b in zip(tensors(compact.output), tensors(reference.output), strict=True):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, equal_nan=True, atol=0.05, rtol=0.05)  # another batch, another rounding
