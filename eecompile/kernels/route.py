"""Each row from the branch that it was sent to: the reference meaning of a routed region.

K branches `[.., n, ..]` of one shape; row i of the result is row i of `branches[choice[i]]`, copied bit for
bit. `choice` is either the branch itself, `[n]` integer, or the router's weights `[n, K]`, of which the
largest counts (ties: the lowest branch; NaN counts as -inf). A choice below 0 takes branch 0, one past the
end the last branch.

Gradient: every branch gets that of its own rows. Weights get the straight-through estimate, the gradient of
the blend `sum_k weights[:, k] * branches[k]` (Bengio et al. 2013).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from eecompile.errors import StrategyError

# --- definition -----------------------------------------------------------------------------------


def route(choice: Tensor, branches: Sequence[Tensor], batch_axis: int = 0) -> Tensor:
    """The definition, in plain torch. With one branch it returns that branch itself; the operator copies.

    Args:
        choice: `[n]` integer, or weights `[n, K]` floating.
        branches: K tensors of one shape and dtype, n rows along `batch_axis`.
        batch_axis: Axis of the rows.

    Returns:
        Shape and dtype of a branch. Differentiable in the branches; in the weights only as an operator.

    Raises:
        StrategyError: No branch, or shapes that do not fit.
    """
    _check(choice, branches, batch_axis)
    index = chosen(choice)
    result = branches[-1]
    for k in reversed(range(len(branches) - 1)):
        here = index <= 0 if k == 0 else index == k
        result = torch.where(per_row(here, result, batch_axis), branches[k], result)
    return result


def chosen(choice: Tensor) -> Tensor:
    """The branch `[n]` int64 that each row takes; see `route`."""
    if not choice.is_floating_point():
        return choice.long()
    return choice.masked_fill(choice.isnan(), -math.inf).max(-1).indices


def per_row(rows: Tensor, like: Tensor, batch_axis: int) -> Tensor:
    """`rows` `[n]` shaped so that it broadcasts along `batch_axis` of `like`."""
    return rows.view(-1, *(1,) * (like.ndim - batch_axis - 1))


def _check(choice: Tensor, branches: Sequence[Tensor], batch_axis: int) -> None:
    if not branches:
        raise StrategyError("a route has no branches", got=0, wanted="at least one")
    first = branches[0]
    for k, branch in enumerate(branches):
        if branch.shape != first.shape or branch.dtype != first.dtype:
            raise StrategyError(
                "the branches of a route differ",
                where=f"branch {k}",
                got=f"{branch.dtype} {list(branch.shape)}",
                wanted=f"{first.dtype} {list(first.shape)}",
            )
    if not 0 <= batch_axis < first.ndim:
        raise StrategyError("no such batch axis", got=batch_axis, wanted=f"0 to {first.ndim - 1}")
    wanted = [first.shape[batch_axis], *([len(branches)] if choice.is_floating_point() else [])]
    if list(choice.shape) != wanted:
        raise StrategyError("the choice does not fit the branches", got=list(choice.shape), wanted=wanted)


# --- operator -------------------------------------------------------------------------------------


@torch.library.custom_op("eecompile::route", mutates_args=())
def route_op(choice: Tensor, branches: Sequence[Tensor], batch_axis: int) -> Tensor:
    """`route` as `torch.ops.eecompile.route`; no default, because autograd loses those next to a list."""
    result = route(choice, branches, batch_axis)
    return result.clone() if len(branches) == 1 else result


@route_op.register_fake
def _fake(choice: Tensor, branches: Sequence[Tensor], batch_axis: int) -> Tensor:
    _check(choice, branches, batch_axis)
    return torch.empty_like(branches[-1])


def _setup(ctx: Any, inputs: tuple[Tensor, Sequence[Tensor], int], output: Tensor) -> None:
    choice, branches, ctx.batch_axis = inputs
    ctx.count, ctx.weighted = len(branches), choice.is_floating_point() and choice.requires_grad
    ctx.save_for_backward(choice, *(branches if ctx.weighted else ()))


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, list[Tensor | None], None]:
    choice, *branches = ctx.saved_tensors
    index = chosen(choice).clamp(0, ctx.count - 1)
    to_branches: list[Tensor | None] = [
        gradient.masked_fill(per_row(index != k, gradient, ctx.batch_axis), 0) for k in range(ctx.count)
    ]
    if not ctx.weighted:
        return None, to_branches, None
    products = [(gradient.float() * b.float()).movedim(ctx.batch_axis, 0).flatten(1).sum(1) for b in branches]
    return torch.stack(products, -1).to(choice.dtype), to_branches, None


route_op.register_autograd(_backward, setup_context=_setup)
