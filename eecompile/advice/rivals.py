"""What early exit is compared with: a smaller model, `torch.compile`, int8 weights and ONNX Runtime."""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from eecompile.advice.sample import Clock
from eecompile.errors import EecompileError
from eecompile.export.runtimes import opened
from eecompile.ir.settings import EXITS
from eecompile.training.batches import Batch
from eecompile.training.scores import check_labels, right

if TYPE_CHECKING:
    from eecompile.module import CompiledModule

Call = Callable[[Batch], Any]
COMPILE, INT8, ONNX, STATIC = "torch.compile", "int8", "ONNX Runtime", "smaller model"
AGAINST = (COMPILE, INT8, ONNX)
NEEDED = {INT8: 1.0, ONNX: 10.0, COMPILE: 60.0}  # seconds that must be left: none of them can be stopped


class Skipped(Exception):
    """Why a rival was not tried."""


@dataclass(frozen=True)
class Rival:
    """Another way to run the model.

    Attributes:
        call: Runs a batch.
        drop: Mean score lost against the model, on the validation rows.
        cost: Fraction of the model's FLOPs.
    """

    name: str
    call: Call
    drop: float
    cost: float = 1.0


def accuracy(call: Callable[[Batch], Tensor], val: list[Batch]) -> float:
    """Mean score of predictions `[B, C]` or `[B, S, C]` over rows with a label."""
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in val:
            found = call(batch)
            score, real = right(found, check_labels(found, batch.labels, batch.where))
            total, count = total + float(score[real].sum()), count + int(real.sum())
    return total / max(count, 1)


def smaller(model: nn.Module, static: nn.Module, val: list[Batch], read: Callable[[Any], Tensor]) -> Rival:
    """A smaller model for the same task.

    Args:
        read: The class scores within an output.
    """
    drop = accuracy(predicting(model, read), val) - accuracy(predicting(static, read), val)
    return Rival(STATIC, lambda b: static(*b.args, **b.kwargs), drop, _flops(static, val[0]) / _flops(model, val[0]))


def predicting(model: nn.Module, read: Callable[[Any], Tensor]) -> Callable[[Batch], Tensor]:
    return lambda b: read(model(*b.args, **b.kwargs))


def _flops(model: nn.Module, batch: Batch) -> float:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*batch.args, **batch.kwargs)
    return max(float(counter.get_total_flops()), 1.0)


@contextmanager
def rivals(
    model: nn.Module,
    fast: CompiledModule,
    val: list[Batch],
    names: tuple[str, ...],
    clock: Clock,
    skip: Callable[[str, str], None],
) -> Iterator[list[Rival]]:
    """Those that work here; `skip` is called with a name and a reason for each of the others."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        makers: dict[str, Callable[[], Rival]] = {
            INT8: lambda: _int8(model, val, fast.prediction_of),
            ONNX: lambda: _onnx(fast, val, Path(folder)),
            COMPILE: lambda: _compiled(model, val),
        }
        for name in (n for n in makers if n in names):
            try:
                if clock.left < NEEDED[name]:
                    raise Skipped(f"it cannot be stopped, and less than {NEEDED[name]:.0f} s are left")
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of exporters and of what they are about to replace
                    found.append(makers[name]())
            except Skipped as reason:
                skip(name, str(reason))
            except EecompileError as error:
                skip(name, "; ".join(str(part) for part in (error.what, error.got) if part))
            except Exception as error:  # noqa: BLE001  compilers and runtimes raise many unrelated types
                skip(name, " ".join(f"{type(error).__name__}: {error}".split())[:160])
        yield found


def _compiled(model: nn.Module, val: list[Batch]) -> Rival:
    if not any(shutil.which(c) for c in (os.environ.get("CXX", "g++"), "clang++")):
        raise Skipped("no C++ compiler is installed")
    optimised = torch.compile(model)
    with torch.no_grad():
        for batch in val[:2]:
            optimised(*batch.args, **batch.kwargs)
    return Rival(COMPILE, lambda b: optimised(*b.args, **b.kwargs), 0.0)


def _int8(model: nn.Module, val: list[Batch], read: Callable[[Any], Tensor]) -> Rival:
    if any(p.device.type != "cpu" for p in model.parameters()):
        raise Skipped("dynamic int8 is for CPUs")
    if not any(type(m) is nn.Linear for m in model.modules()):
        raise Skipped("the model has no linear layers")
    quantize: Any = torch.ao.quantization.quantize_dynamic
    small = quantize(copy.deepcopy(model).eval(), {nn.Linear}, dtype=torch.qint8)
    drop = accuracy(predicting(model, read), val) - accuracy(predicting(small, read), val)
    return Rival(INT8, lambda b: small(*b.args, **b.kwargs), drop)


def _onnx(fast: CompiledModule, val: list[Batch], folder: Path) -> Rival:
    before = fast.settings
    fast.settings = before.neutral(EXITS)
    try:
        run = opened(fast.export(folder / "model.onnx", target="onnx")).run
    finally:
        fast.settings = before
    at = fast.program.prediction.index
    assert at is not None

    def call(b: Batch) -> list[Tensor]:
        return run(fast.flatten(b.args, b.kwargs))

    full = accuracy(lambda b: fast.prediction_of(fast.full(*b.args, **b.kwargs)), val)
    return Rival(ONNX, call, full - accuracy(lambda b: call(b)[at], val))
