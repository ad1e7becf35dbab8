"""Moves a captured graph to another device: parameters move by themselves, devices written into nodes do not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from eecompile.errors import CaptureError
from eecompile.signature import Signature


def move_constants(graph_module: fx.GraphModule, device: torch.device) -> int:
    """Rewrites every device argument of the graph's nodes; gives how many there were. Nested graphs too."""
    count = 0

    def moved(a: Any) -> Any:
        nonlocal count
        if isinstance(a, torch.device):
            count += 1
            return device
        if isinstance(a, list | tuple):
            return type(a)(moved(x) for x in a)
        return a

    for module in graph_module.modules():
        if not isinstance(module, fx.GraphModule):
            continue
        before = count
        for n in module.graph.nodes:
            if n.op == "call_function":
                n.args = tuple(moved(a) for a in n.args)
                n.kwargs = {k: moved(v) for k, v in n.kwargs.items()}
        if count > before:
            module.recompile()
    return count


def other_device(signature: Signature, flat: Sequence[Tensor], device: torch.device) -> CaptureError | None:
    """The error for a call that failed because an input is not where the program is; None where all inputs are."""
    for t, leaf in zip(flat, signature.inputs, strict=True):
        if t.device != device:
            return CaptureError(
                "an input is on another device than the program",
                where=leaf.path,
                got=t.device,
                wanted=device,
                hint=f'move the input with .to("{device}"), or the program with fast.to("{t.device}")',
            )
    return None
