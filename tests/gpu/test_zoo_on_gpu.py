"""Every model of the zoo on a CUDA device in three precisions: `device` against `reference`. Never run yet."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from eecompile import CompiledModule, eecompile, strategies
from eecompile.result import Result
from eecompile.runtime.device.executor import Options
from tests.support import executor
from tests.zoo import ZOO

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
GAP = 4e-3  # at least: no row is then as near to a threshold as half precision may move it
SPREAD = 4.0  # heads of random weights say nearly the same of all rows: theirs are multiplied by this


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("name", sorted(ZOO))
def test_device_agrees_with_the_reference(name, dtype):
    check(name, dtype, "cuda", "device")


def check(name, dtype, device, executor, structures=("nested", "machine"), batches=(1, 7)):
    """On the CPU the same with the simulator, which is how this test is tested."""
    try:
        fast = compiled(name, dtype, device)
    except (RuntimeError, NotImplementedError) as error:
        if dtype == torch.float32:
            raise
        pytest.skip(f"the model itself does not run in {dtype}: {str(error)[:200]}")
    for structure in structures:
        fast.device_options = Options(structure=structure)
        for batch in batches:
            args, kwargs = inputs(name, batch, device, dtype)
            confidences = [c.cpu() for c in fast.observe(*args, **kwargs).confidences[:-1]]
            for seed in (batch, batch + 1):  # the second time with other thresholds, and no other capture
                thresholds = wide(confidences, random.Random(seed))
                fast.set_thresholds(thresholds)
                got, want = run(fast, executor, args, kwargs), run(fast, "reference", args, kwargs)
                agree(fast, got, want, confidences, thresholds)


def inputs(name: str, batch: int, device: str = "cuda", dtype: torch.dtype = torch.float32, seed: int = 1) -> Any:
    """Of a model of the zoo, on a device; those that are numbers of a float dtype in another one."""
    return torch.utils._pytree.tree_map_only(
        Tensor, lambda t: t.to(device, dtype if t.is_floating_point() else None), ZOO[name].inputs(batch, seed=seed)
    )


def compiled(name: str, dtype: torch.dtype = torch.float32, device: str = "cuda") -> CompiledModule:
    entry, (args, kwargs) = ZOO[name], inputs(name, 6, device, dtype)
    model = entry.model().to(device, dtype)
    with torch.no_grad():
        model(*args, **kwargs)  # a model that cannot run in this precision says so itself
    strategy = strategies.Branchy(exits=entry.exits, criterion="entropy")
    fast = eecompile(model, strategy, example_inputs=args, example_kwargs=kwargs, **entry.options)
    with torch.no_grad():
        for p in fast.head_parameters():
            if p.dim() > 1:
                p.mul_(SPREAD)
    return fast


def run(fast: CompiledModule, name: str, args: Any, kwargs: Any) -> Result:
    with torch.no_grad(), executor(fast, name):
        return fast.run(*args, **kwargs)


def wide(confidences: Sequence[Tensor], rng: random.Random) -> list[float]:
    """For each exit the middle of one of the three widest gaps between the confidences of the rows, none under `GAP`."""
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
    same = mine == theirs
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 5e-2}.get(a.dtype, 1e-2)
    torch.testing.assert_close(a[same].float(), b[same].float(), atol=tolerance, rtol=tolerance, equal_nan=True)
