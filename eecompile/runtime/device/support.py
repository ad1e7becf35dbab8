"""What this machine can do with device programs, and why not."""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass
from typing import Literal

import torch

from eecompile.kernels._triton import HAVE_TRITON

Way = Literal["graph", "bound", "none"]
CUDA_WANTED = 12080  # SWITCH nodes
VERIFIED = False
"""Whether the GPU tests have passed on a GPU. Until then `executor="auto"` does not choose the device executor."""


@dataclass(frozen=True)
class Support:
    """How the device executor runs on a device.

    Attributes:
        way: "graph" for one CUDA graph with conditional nodes, "bound" for launches that follow a bound from above on the
            number of survivors, "none" where there is no GPU.
        reason: Why it is that one.
    """

    way: Way
    reason: str


def support(device: torch.device) -> Support:
    """What is possible on a device."""
    if device.type != "cuda":
        return Support("none", f"the program is on {device.type}; the device executor needs a CUDA device")
    if not HAVE_TRITON:
        return Support("none", "there is no Triton, which the decisions' kernels are written in")
    missing = conditional_nodes_missing()
    if missing:
        return Support("bound", missing)
    return Support("graph", "CUDA graphs with conditional nodes")


@functools.cache
def conditional_nodes_missing() -> str:
    """Why there are no conditional nodes here; empty where there are."""
    if torch.version.hip is not None:
        return "ROCm has no conditional nodes"
    if importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.bindings") is None:
        return "cuda.bindings is not installed, which conditional nodes are made with: pip install cuda-bindings"
    if torch.cuda.get_allocator_backend() != "native":
        return f"torch's allocator is {torch.cuda.get_allocator_backend()}; bodies of conditional nodes need the native one"
    from cuda.bindings import runtime  # type: ignore[import-not-found, unused-ignore]

    error, driver = runtime.cudaDriverGetVersion()
    if int(error) != 0 or driver < CUDA_WANTED:
        return f"the driver knows CUDA {driver // 1000}.{driver % 1000 // 10}; SWITCH nodes need 12.8"
    return ""
