"""What the tests of kernels share, in Triton's interpreter on the CPU or compiled on a GPU."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from eecompile.kernels._triton import INTERPRETED, LAUNCHES

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NAN, INF = math.nan, math.inf
DEVICE = "cpu" if INTERPRETED else "cuda"
torch.set_default_device(DEVICE)
NIGHTLY = pytest.mark.nightly  # past one block of columns: slow in the interpreter
BUCKETS = torch.tensor([1, 2, 4, 8, 16, 32, 64, 2048], dtype=torch.int32)

torch.set_num_threads(1)


def _loop_bounds_with_numpy_2_4() -> None:
    """Triton 3.6 takes int() of an array of one element, which NumPy 2.4 refuses; later Tritons do what this does."""
    from triton.runtime import interpreter

    plain = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        plain(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patched


if INTERPRETED:
    _loop_bounds_with_numpy_2_4()


def in_dtypes(sizes: list[Any], slow: list[Any], dtypes: Sequence[torch.dtype] = DTYPES) -> list[Any]:
    """Parameters: each size in every dtype; those in `slow` are nightly, but for the first in the first dtype."""
    found: list[Any] = [(*size, dtype) for size in sizes for dtype in dtypes]
    found += [pytest.param(*size, dtype, marks=NIGHTLY) for size in slow for dtype in dtypes]
    found[len(sizes) * len(dtypes)] = (*slow[0], dtypes[0])
    return found


def seeded(seed: int) -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(seed)


@contextlib.contextmanager
def launched(name: str) -> Iterator[None]:
    """Fails unless the kernel ran meanwhile; numpy's remarks on inf and NaN are not news."""
    before = LAUNCHES[name]
    with np.errstate(all="ignore"):
        yield
    assert LAUNCHES[name] > before


def close(got: torch.Tensor, wanted: torch.Tensor) -> None:
    if got.is_floating_point():
        torch.testing.assert_close(got.double(), wanted.double(), rtol=2e-5, atol=2e-6, equal_nan=True)
    else:
        assert torch.equal(got, wanted.to(got.dtype))


def logits(n: int, C: int, dtype: torch.dtype, strided: bool = False) -> torch.Tensor:
    """Rows with a NaN, a +inf, masked classes, nothing but -inf, and a tie for the largest, where they fit in."""
    g = seeded(n * 7919 + C)
    x = (torch.randn(n, C, generator=g) * 4).to(dtype)
    if C > 2:
        x[-1, [0, C // 2, C - 1]] = 30.0
    for row, (where, what) in enumerate([(C // 2, NAN), (C - 1, INF), (0, -INF), (slice(None), -INF)], start=1):
        if row < n - 1:
            x[row, where] = what
    return torch.stack((x, torch.full_like(x, NAN)), -1).flatten(1)[:, ::2] if strided else x
