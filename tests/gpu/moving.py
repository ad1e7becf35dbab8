"""Models of the zoo on a GPU, in any precision, and thresholds that rounding does not flip."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from eecompile import CompiledModule, eecompile, strategies
from eecompile.program import Result
from tests.support import executor
from tests.zoo import ZOO, Entry

GAP = 4e-3  # at least: no row is then as near to a threshold as half precision may move it
SPREAD = 4.0  # heads of random weights say nearly the same of all rows: theirs are multiplied by this


def moved(value: Any, device: torch.device | str, dtype: torch.dtype) -> Any:
    """Inputs on a device; those that are numbers of a float dtype in another one."""
    if isinstance(value, dict):
        return {k: moved(v, device, dtype) for k, v in value.items()}
    if isinstance(value, tuple):
        return tuple(moved(v, device, dtype) for v in value)
    if not isinstance(value, Tensor):
        return value
    return value.to(device, dtype if value.is_floating_point() else None)


def compiled(
    name: str, dtype: torch.dtype = torch.float32, device: str = "cuda", batch: int = 6
) -> tuple[Entry, CompiledModule]:
    entry = ZOO[name]
    args, kwargs = moved(entry.inputs(batch), device, dtype)
    model = entry.model().to(device, dtype)
    with torch.no_grad():
        model(*args, **kwargs)  # a model that cannot run in this precision says so itself
    strategy = strategies.Branchy(exits=entry.exits, criterion="entropy")
    fast = eecompile(model, strategy, example_inputs=args, example_kwargs=kwargs, **entry.options)
    with torch.no_grad():
        for p in fast.head_parameters():
            if p.dim() > 1:
                p.mul_(SPREAD)
    return entry, fast


def run(fast: CompiledModule, name: str, args: Any, kwargs: Any) -> Result:
    with torch.no_grad(), executor(fast, name):
        return fast.run(*args, **kwargs)


def wide(confidences: Sequence[Tensor], rng: random.Random) -> list[float]:
    """For each exit the middle of one of the three widest gaps between the confidences of the rows, none under 4e-3."""
    found = []
    for c in confidences:
        points = sorted({0.0, 1.0, *(v for v in c.tolist() if v == v)})
        gaps = sorted(zip(points, points[1:], strict=False), key=lambda gap: gap[0] - gap[1])
        low, high = rng.choice([gap for gap in gaps[:3] if gap[1] - gap[0] >= GAP] or gaps[:1])
        found.append((low + high) / 2)
    return found


def agree(
    fast: CompiledModule, got: Result, want: Result, confidences: Sequence[Tensor], thresholds: Sequence[float]
) -> None:
    """Exits equal but for rows within 1e-3 of a threshold, and outputs of the others equal up to rounding."""
    near = torch.zeros(len(want.exit_index), dtype=torch.bool)
    for c, t in zip(confidences, thresholds, strict=True):
        near |= (c - t).abs() < 1e-3
    mine, theirs = got.exit_index.cpu(), want.exit_index.cpu()
    assert torch.equal(mine[~near], theirs[~near]), f"{mine.tolist()} and {theirs.tolist()}"
    a, b = fast.prediction_of(got.output).cpu(), fast.prediction_of(want.output).cpu()
    same, single = mine == theirs, a.dtype == torch.float32
    tolerance = 1e-4 if single else 5e-2 if a.dtype == torch.bfloat16 else 1e-2
    torch.testing.assert_close(a[same].float(), b[same].float(), atol=tolerance, rtol=tolerance, equal_nan=True)
