"""One backward for every operator of the vocabulary: run the definition again on the saved inputs,
differentiate it.

An operator is opaque to autograd, so its gradient has to be registered. The definitions are plain torch and
short; recomputing one costs less than keeping its intermediates from the forward pass to the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree

Definition = Callable[..., "torch.Tensor | tuple[torch.Tensor, ...]"]


def differentiable(op: Any, definition: Definition) -> None:
    """Registers first-order gradients for `op`.

    Args:
        op: What `torch.library.custom_op` gave; all of its tensor arguments are positional.
        definition: Takes the operator's arguments in the operator's order.
    """

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        leaves, ctx.spec = pytree.tree_flatten(list(inputs))
        ctx.save_for_backward(*(x if isinstance(x, torch.Tensor) else None for x in leaves))
        ctx.constants = [None if isinstance(x, torch.Tensor) else x for x in leaves]

    def backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:
        with torch.enable_grad():
            leaves = [
                constant if saved is None else saved.detach().requires_grad_(saved.requires_grad)
                for saved, constant in zip(ctx.saved_tensors, ctx.constants, strict=True)
            ]
            results = definition(*pytree.tree_unflatten(leaves, ctx.spec))
            results = (results,) if isinstance(results, torch.Tensor) else results
            pairs = [(y, g) for y, g in zip(results, gradients, strict=True) if g is not None and y.requires_grad]
        wanted = [x for x in leaves if isinstance(x, torch.Tensor) and x.requires_grad]
        found: list[torch.Tensor | None] = [None] * len(wanted)
        if pairs and wanted:
            ys, gs = zip(*pairs, strict=True)
            found = list(torch.autograd.grad(ys, wanted, gs, allow_unused=True))
        queue = iter(found)
        filled = [next(queue) if isinstance(x, torch.Tensor) and x.requires_grad else None for x in leaves]
        return tuple(pytree.tree_unflatten(filled, ctx.spec))

    op.register_autograd(backward, setup_context=setup)
