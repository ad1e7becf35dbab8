"""Sets the condition of a CUDA graph's node from a number in device memory, in one thread.

`cudaGraphSetConditional(handle, number[element])`. A conditional node of CUDA reads its handle only; where the number was
not written by a kernel that could set the handle itself (`decide` can), this one stands before the node. There is no
definition: without a graph there is no condition.
"""
# mypy: disable-error-code="no-untyped-def"
# (arguments of device functions have no Python types)

from __future__ import annotations

from torch import Tensor

from eecompile.errors import MissingDependencyError
from eecompile.kernels._triton import HAVE_TRITON, LAUNCHES, extern_libs, set_conditional, tl, triton

# --- kernel ---------------------------------------------------------------------------------------

if HAVE_TRITON:

    @triton.jit(do_not_specialize=["element", "below", "handle"])
    def condition_kernel(numbers, element, below, handle: tl.uint64, COMPARE: tl.constexpr):
        number = tl.load(numbers + element)
        if COMPARE:
            set_conditional(handle, (number < below).to(tl.int32))
        else:
            set_conditional(handle, number)


# --- launch ---------------------------------------------------------------------------------------


def launch_condition(numbers: Tensor, element: int, handle: int, below: int | None = None) -> None:
    """One thread that sets `handle`.

    Args:
        numbers: int32, on a CUDA device.
        element: Which of them.
        handle: A `cudaGraphConditionalHandle`.
        below: Sets whether the number is below this, instead of the number.

    Raises:
        MissingDependencyError: There is no Triton.
    """
    if not HAVE_TRITON:
        raise MissingDependencyError("conditions of CUDA graphs are set by a Triton kernel", hint="pip install triton")
    LAUNCHES["condition"] += 1
    condition_kernel[(1,)](
        numbers,
        element,
        0 if below is None else below,
        handle,
        COMPARE=below is not None,
        num_warps=1,
        extern_libs=extern_libs(),
    )
