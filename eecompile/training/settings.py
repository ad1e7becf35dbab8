"""What a training run may change, and what a checkpoint must share with the run that goes on from it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from eecompile.ir.settings import BUFFERS
from eecompile.passes.insert_exits import HEADS
from eecompile.training.batches import length_of
from eecompile.training.plan import Plan, StagePlan

if TYPE_CHECKING:
    from eecompile.module import CompiledModule


def trained_tensors(fast: CompiledModule, plan: Plan) -> dict[str, Tensor]:
    """By name: the parameters of all stages, and the buffers (batch norm's and such) without those of the
    settings."""
    wanted: set[int] = set()
    if any(stage.heads for stage in plan.stages):
        wanted |= {id(p) for p in fast.head_parameters()}
    if any(stage.trunk for stage in plan.stages):
        wanted |= {id(p) for p in fast.trunk_parameters()}
    found: dict[str, Tensor] = {name: p for name, p in fast.named_parameters() if id(p) in wanted}
    return found | {name: b for name, b in fast.named_buffers() if name.rpartition(".")[2] not in BUFFERS}


def settings(
    fast: CompiledModule, plan: Plan, loader: Any, accelerator: Any, trained: dict[str, Tensor], heads_free: bool
) -> dict[str, Any]:
    """Everything that must be equal, as JSON reads it back. The number of epochs only where it matters.

    Args:
        heads_free: Whether heads are fitted on kept features, so that their kinds, and with them their tensors, may change.
    """
    named: dict[str, Any] = {
        name: getattr(plan, name) for name in ("lr", "trunk_lr", "weight_decay", "max_grad_norm", "patience", "seed")
    }
    for name in ("optimizer", "scheduler", "metric"):
        value = getattr(plan, name)
        named[name] = value if value is None or isinstance(value, str) else called(value)
    fixed_length = plan.scheduler is not None or len(plan.stages) > 1
    named["stages"] = [[s.name, *([s.epochs] if fixed_length else []), *_asked(s)] for s in plan.stages]
    named |= {
        "objective": plan.objective.to_dict(),
        "batches_per_epoch": length_of(loader),
        "batch_size": getattr(loader, "batch_size", None),
        "processes": accelerator.num_processes,
        "exits": [record.name for record in fast.exits],
        "tensors": {name: list(tensor.shape) for name, tensor in trained.items()},
    }
    if heads_free:
        named["tensors"] = {n: s for n, s in named["tensors"].items() if HEADS not in n}
        named |= {"kept features": True, "draws": plan.draws, "weight_decay": plan.decay}
    return cast("dict[str, Any]", json.loads(json.dumps(named)))


def _asked(stage: StagePlan) -> list[Any]:
    """What the strategy asked of this stage."""
    return [v for v in (stage.gate_mode, stage.objective and stage.objective.to_dict(), stage.full_share) if v]


def called(function: Any) -> str:
    return str(getattr(function, "__qualname__", type(function).__qualname__))
