"""One step's forward pass as a module, so that accelerate can wrap it (mixed precision, several
processes)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from eecompile.result import Result
from eecompile.training.batches import Batch
from eecompile.training.decisions import KINDS
from eecompile.training.objectives import AdaLoss, Distillation, Exits, Objective, PerExitLoss, Sum, outputs_of
from eecompile.training.scores import Metric, row_scores

if TYPE_CHECKING:
    from eecompile.module import CompiledModule


class Step(nn.Module):
    """Runs the compiled module in train mode and applies the objective.

    Args:
        final_only: Only the model's own output counts: the first of two stages.
    """

    def __init__(self, fast: CompiledModule, objective: Objective, metric: Metric | None, *, final_only: bool) -> None:
        super().__init__()
        self.fast = cast(Any, fast)
        self.objective, self.metric, self.final_only = objective, metric, final_only

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Loss (0-dim), and what `sums` gives."""
        result: Result = self.fast.run(*batch.args, **batch.kwargs)
        measured = self.objective.final if self.final_only else self.objective
        loss = measured(result, batch.labels, where=batch.where)
        return loss, *sums(self.fast, result, batch.labels, self.objective, self.metric, batch.where)


@torch.no_grad()
def sums(
    fast: CompiledModule, result: Result, labels: Any, objective: Objective, metric: Metric | None, where: str
) -> tuple[Tensor, dict[str, Tensor]]:
    """`[rows, rows with a label]`, and by name sums over the rows, float64 on the CPU: "scores" `[E + 1]` of every output
    where it has any, and of each kind what was decided."""
    found = {}
    scores = scored(result, labels, metric, objective, where)
    if scores is not None:
        found["scores"] = scores[0].sum(0)
    for kind in KINDS:
        decided = kind.sums(fast, result, objective, scores)
        if decided is not None:
            found[kind.name] = decided.cpu()
    labelled = 0.0 if scores is None else float(scores[1].sum())
    return torch.tensor([outputs_of(result)[-1].shape[0], labelled], dtype=torch.float64), found


def scored(
    result: Result, labels: Any, metric: Metric | None, objective: Objective, where: str
) -> tuple[Tensor, Tensor] | None:
    """Scores `[B, E + 1]` of every output and bool `[B]` of the rows with a label, on the CPU.

    None where there is neither a metric nor a classification.
    """
    if metric is None and (labels is None or not classifies(objective)):
        return None
    return row_scores([output.detach() for output in outputs_of(result)], labels, metric, where)


def classifies(objective: Objective) -> bool:
    """Whether the objective reads labels as class indices."""
    if isinstance(objective, Sum):
        return all(classifies(part) for part in objective.parts)
    if isinstance(objective, Exits):
        return objective.distillation < 1
    return not isinstance(objective, PerExitLoss) and not (
        isinstance(objective, AdaLoss | Distillation) and objective.alpha == 1
    )
