"""Triton, where there is one: the guarded import, the interpreter, and a graph condition set by a kernel.

Kernels are defined under `if HAVE_TRITON:`; everything else in a kernel's file works without Triton. With
`TRITON_INTERPRET=1` in the environment before the first import, kernels run on CPU tensors.
"""

from __future__ import annotations

import collections
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

__all__ = [  # triton and tl are handed on from here: nothing else imports Triton
    "HAVE_TRITON",
    "INTERPRETED",
    "LAUNCHES",
    "either",
    "extern_libs",
    "power_of_2",
    "runs_on",
    "set_conditional",
    "tiles",
    "tl",
    "triton",
]

try:
    import triton
    import triton.language as tl

    HAVE_TRITON = True
    INTERPRETED = bool(triton.knobs.runtime.interpret)
except ImportError:
    triton = tl = None
    HAVE_TRITON = INTERPRETED = False

LAUNCHES: collections.Counter[str] = collections.Counter()
"""How often each kernel was launched in this process: tests assert with it which path ran."""


def runs_on(tensor: torch.Tensor) -> bool:
    """Whether a Triton kernel can run on this tensor: on a GPU, or anywhere in the interpreter."""
    if not (HAVE_TRITON and (tensor.is_cuda or (INTERPRETED and tensor.device.type == "cpu"))):
        return False
    return type(tensor) in (torch.Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()


Function = TypeVar("Function", bound=Callable[..., Any])


def either(definition: Function, launch: Callable[..., Any]) -> Function:
    """`definition` by its kernel where that can run on the first argument.

    The definition runs where gradients are asked for, which it alone has, and in float64, in which no kernel computes.
    """

    @functools.wraps(definition)
    def run(first: torch.Tensor, *args: Any, **options: Any) -> Any:
        if runs_on(first) and first.dtype != torch.float64 and not _differentiates((first, *args, *options.values())):
            return launch(first, *args, **options)
        return definition(first, *args, **options)

    run.__name__ = run.__qualname__ = f"run_{definition.__name__}"  # where it lies in the kernel's module
    return cast(Function, run)


def _differentiates(given: tuple[Any, ...]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in given)


def power_of_2(n: int) -> int:
    """The smallest power of two that is `n` or more."""
    return 1 << max(n - 1, 0).bit_length()


def tiles(columns: int, rows: int) -> dict[str, int]:
    """Block sizes for reading `[rows, columns]`: about 1,024 elements at a time, 4,096 for vocabularies."""
    block = min(power_of_2(columns), 4096 if columns > 8192 else 1024)
    return {
        "R": max(1, min(1024 // block, 16, power_of_2(rows))),
        "BLOCK_C": block,
        "num_warps": 8 if columns > 8192 else 4,
    }


# LLVM IR that is linked into a kernel. Every thread of the block calls the function, only thread 0 may set
# the handle. Handle 0 stands for "not in a graph" and does nothing. The driver resolves the symbol.
SET_CONDITIONAL = """declare void @cudaGraphSetConditional(i64, i32)
declare i32 @llvm.nvvm.read.ptx.sreg.tid.x() nounwind readnone
define i32 @ee_set_conditional(i64 %h, i32 %v) {
  %t = call i32 @llvm.nvvm.read.ptx.sreg.tid.x()
  %first = icmp eq i32 %t, 0
  %live = icmp ne i64 %h, 0
  %go = and i1 %first, %live
  br i1 %go, label %set, label %out
set:
  call void @cudaGraphSetConditional(i64 %h, i32 %v)
  br label %out
out:
  ret i32 %v
}
"""


def extern_libs() -> dict[str, str]:
    """For `kernel[grid](..., extern_libs=extern_libs())` of a kernel that sets a condition (NVIDIA only).

    Triton hashes the file whenever it compiles, so the path has to stay: it lies next to Triton's own cache.
    """
    path = Path(triton.knobs.cache.dir) / "eecompile_set_conditional.ll"
    if not path.exists() or path.read_text() != SET_CONDITIONAL:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(f".{os.getpid()}")
        fresh.write_text(SET_CONDITIONAL)
        fresh.replace(path)
    return {"ee_set_conditional": str(path)}


if HAVE_TRITON:
    from triton.language import core as _core

    @_core.extern  # type: ignore[untyped-decorator, unused-ignore]
    def set_conditional(handle: Any, value: Any, _semantic: Any = None) -> Any:
        """In a kernel: sets graph condition `handle` (uint64) to `value` (int32). One block at most may
        call it."""
        signature = {
            (_core.dtype(h), _core.dtype(v)): ("ee_set_conditional", _core.dtype("int32"))
            for h in ("int64", "uint64")
            for v in ("int32", "uint32")
        }
        return _core.extern_elementwise("", "", [handle, value], signature, is_pure=False, _semantic=_semantic)

else:
    set_conditional = None
