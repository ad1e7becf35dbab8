"""Settings under which exported programs are compared with the reference, and the comparison."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from eecompile import CompiledModule
from eecompile.ir.settings import BRANCHES, EXITS, GATES, HALTING
from eecompile.passes.lower_cond import input_names
from tests.kinds import Call
from tests.support import CLOSED, close, neutral, random_settings, run_by

SIZES = (1, 2, 5, 64)
Run = Callable[[Sequence[Tensor], dict[str, Tensor]], Sequence[Any]]
"""Outputs from the model's inputs, and from the settings by the name of their tensor."""


MakeCall = Callable[[int, int], Call]
"""Arguments of a call from the batch size and a seed."""


def undecided(fast: CompiledModule) -> None:
    """Everything that chooses is in the program: no exit, gate or branch is closed, no gate always open."""
    for family, value in ((EXITS, 0.5), (GATES, 0.5), (HALTING, 1.0), (BRANCHES, 0.0)):
        if family in fast.settings:
            fast.settings = fast.settings.with_values(family, value)


def draws(fast: CompiledModule, args: Any, kwargs: Any) -> list[str]:
    """Names of the settings to compare under, in order; see `put`."""
    return ["none", "all", "random 1", "random 2"] if fast.exits else ["none", "random 1", "random 2"]


def put(fast: CompiledModule, name: str, args: Any, kwargs: Any) -> None:
    """Nothing exits and nothing is skipped, everything leaves at the first exit, or numbers in gaps of what is computed."""
    neutral(fast)
    if name == "all":
        fast.set_thresholds(0.0)
    elif name != "none":
        random_settings(fast, args, kwargs, random.Random(int(name.split()[1])))


def same_as_reference(
    fast: CompiledModule, call: MakeCall, run: Run, sizes: Sequence[int] = SIZES, tolerance: float = 1e-5
) -> set[int]:
    """Compares outputs, exits and confidences at every batch size and setting; gives the exits that were taken."""
    taken: set[int] = set()
    for size in sizes:
        args, kwargs = call(size, 3)
        for name in draws(fast, args, kwargs):
            put(fast, name, args, kwargs)
            want = run_by("reference", fast, *args, **kwargs)
            *leaves, index, confidence = map(torch.as_tensor, run(fast.flatten(args, kwargs), tensors_of(fast)))
            assert torch.equal(index, want.exit_index), (size, name)
            assert index.dtype == torch.int64
            torch.testing.assert_close(confidence, want.confidence, atol=5e-5, rtol=0)
            for got, wanted in zip(leaves, fast.program.signature.flatten_output(want.output), strict=True):
                close(got, wanted, tolerance)
            taken |= set(index.tolist())
    return taken


def runner_of(program: ExportedProgram, fast: CompiledModule) -> Run:
    """Runs an exported program with settings put into its buffers."""
    module, names = program.module(), input_names(fast.program)
    held = {n for n in tensors_of(fast) if n in program.state_dict}

    def run(flat: Sequence[Tensor], settings: dict[str, Tensor]) -> Any:
        with torch.no_grad():
            for n in held:
                getattr(module, n).copy_(settings[n])
            return module(flat[0]) if len(flat) == 1 else module(**dict(zip(names, flat, strict=True)))

    return run


def tensors_of(fast: CompiledModule) -> dict[str, Tensor]:
    return fast.settings.tensors(torch.device("cpu"))


__all__ = ["CLOSED", "SIZES", "put", "runner_of", "same_as_reference", "tensors_of", "undecided"]
