"""The optimizer and the learning-rate schedule of one stage."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from eecompile.errors import EecompileError
from eecompile.training.batches import length_of
from eecompile.training.plan import Plan, StagePlan

if TYPE_CHECKING:
    from eecompile.module import CompiledModule


def parameter_groups(fast: CompiledModule, plan: Plan, stage: StagePlan) -> list[dict[str, Any]]:
    """Heads, then trunk, each parameter once, those that require a gradient only."""
    seen: set[int] = set()
    groups = []
    heads = list(fast.head_parameters()) if stage.heads else []
    trunk = list(fast.trunk_parameters()) if stage.trunk else []
    for parameters, lr in ((heads, plan.lr), (trunk, plan.trunk_lr)):
        fresh = []
        for parameter in parameters:
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                fresh.append(parameter)
        if fresh:
            groups.append({"params": fresh, "lr": lr, "weight_decay": plan.weight_decay})
    if not groups:
        raise nothing_to_train(stage.name)
    return groups


def nothing_to_train(stage: str) -> EecompileError:
    return EecompileError(
        "there is nothing to train",
        got=f"no parameter that requires a gradient in stage {stage!r}",
        hint='where the exits have no layers of their own (head="shared", a cascade of models) pass trunk=True to '
        "train the models themselves; or check requires_grad",
    )


def make_optimizer(plan: Plan, groups: list[dict[str, Any]]) -> Optimizer:
    if plan.optimizer is None:
        return torch.optim.AdamW(groups, lr=plan.lr)
    made: Any = plan.optimizer(groups)
    if not isinstance(made, Optimizer):
        raise EecompileError(
            "optimizer= must make a torch optimizer from parameter groups",
            got=type(made).__name__,
            wanted="for example lambda groups: torch.optim.SGD(groups, lr=0.1)",
        )
    return made


def make_scheduler(plan: Plan, optimizer: Optimizer, stage: StagePlan, loader: Any) -> Any:
    if plan.scheduler is None:
        return None
    if isinstance(plan.scheduler, str):  # "cosine", checked by fit
        return cosine(optimizer, stage.epochs * (length_of(loader) or 1))
    return plan.scheduler(optimizer)


def cosine(optimizer: Optimizer, steps: int) -> LambdaLR:
    """From the full learning rate to 0 over `steps` steps (Loshchilov and Hutter 2017), no restarts."""
    return LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * min(step, steps) / steps)))


def freeze(parameters: list[nn.Parameter]) -> Callable[[], None]:
    """Freezes the parameters; the function returned puts them back."""
    before = [(parameter, parameter.requires_grad) for parameter in parameters]
    for parameter in parameters:
        parameter.requires_grad_(False)

    def restore() -> None:
        for parameter, flag in before:
            parameter.requires_grad_(flag)

    return restore
