"""One step's forward pass as a module, so that accelerate can wrap it (mixed precision, several
processes)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from eecompile.result import Result
from eecompile.training.batches import Batch
from eecompile.training.full import halts
from eecompile.training.halt_report import halted
from eecompile.training.objectives import AdaLoss, Distillation, Exits, Objective, PerExitLoss, Sum, outputs_of
from eecompile.training.scores import Metric, check_labels, measure, right

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

    def forward(self, batch: Batch) -> tuple[Tensor, ...]:
        """Loss (0-dim), summed scores `[E + 1]` float64 (empty without labels), `[rows, rows with a label]`, and what
        `gated`, `routed` and `halted` give."""
        result: Result = self.fast.run(*batch.args, **batch.kwargs)
        measured = self.objective.final if self.final_only else self.objective
        loss = measured(result, batch.labels, where=batch.where)
        with torch.no_grad():
            sums, labelled = scored(result, batch.labels, self.metric, self.objective, batch.where)
            sent = routed(self.fast, result, batch.labels, self.metric, self.objective, batch.where)
            steps = halted(result, self.objective, halts(self.fast))
        rows = outputs_of(result)[-1].shape[0]
        counts = torch.tensor([rows, labelled], dtype=torch.float64)
        scores = torch.tensor(sums or [], dtype=torch.float64)
        return loss, scores, counts, gated(self.fast, result), sent, steps


def gated(fast: CompiledModule, result: Result) -> Tensor:
    """`[1 + 2 G]` float64, empty without gates: sums over the rows of the cost with all exits closed, of every gate's
    decision in this run, and of its score against its threshold."""
    if result.gates is None or result.trace.gate_scores is None or result.trace.end_cost is None:
        return torch.empty(0, dtype=torch.float64)
    cost = result.trace.end_cost.detach().double().sum().reshape(1)
    ran = result.gates.detach().double().sum(0)
    threshold = fast.gate_thresholds
    decided = (~(result.trace.gate_scores.detach().float() < threshold) & (threshold <= 1)).double().sum(0)
    return torch.cat((cost, ran, decided)).cpu()


def routed(
    fast: CompiledModule, result: Result, labels: Any, metric: Metric | None, objective: Objective, where: str
) -> Tensor:
    """`[1 + 6 K]` float64, empty without a router: sums over the rows of the cost, and for each of K routes of the rows that
    took it in this run, those among them with a label, their score, the rows that it would have been decided for, its
    probability, and that squared."""
    if result.route is None or result.trace.route_weights is None:
        return torch.empty(0, dtype=torch.float64)
    outputs = [output.detach() for output in outputs_of(result)]
    to_exits = fast.program.choices.routes[0].to_exits
    rows, count = len(result.route), result.trace.route_weights.shape[1]
    score, valid = torch.zeros(rows, dtype=torch.float64), torch.zeros(rows, dtype=torch.bool)
    if metric is not None or (labels is not None and classifies(objective)):
        every = []
        for output in outputs if to_exits else outputs[-1:]:
            if metric is not None:
                every.append(measure(metric, output, labels, rows, where).cpu())
                valid = torch.ones(rows, dtype=torch.bool)
            else:
                value, real = right(output, check_labels(output, labels, where))
                every.append(value.cpu())
                valid = real.cpu()
        at = result.route.cpu() if to_exits else torch.zeros(rows, dtype=torch.long)
        score = torch.stack(every, 1).gather(1, at.unsqueeze(1)).squeeze(1)
    took = torch.nn.functional.one_hot(result.route.cpu().clamp_min(0), count) * (result.route.cpu() >= 0).unsqueeze(1)
    took = took.double()
    ready = valid.double().unsqueeze(1)
    cost = (
        (result.trace.end_cost if result.trace.end_cost is not None else fast.route_costs()[result.route]).detach().double()
    )
    sums = [cost.cpu().sum().reshape(1), took.sum(0), (took * ready).sum(0), (took * ready * score.unsqueeze(1)).sum(0)]
    sums.append(decided(fast, result).double().cpu())
    p = result.trace.route_weights.detach().double().cpu()
    sums += [p.sum(0), p.square().sum(0)]
    return torch.cat(sums)


def decided(fast: CompiledModule, result: Result) -> Tensor:
    """[K] rows that each route is decided for by the router's probabilities as they are, whatever training does."""
    weights = result.trace.route_weights
    assert weights is not None and result.route is not None
    if fast.program.choices.routes[0].to_exits:
        return torch.nn.functional.one_hot(result.route, weights.shape[1]).sum(0)
    there = (result.route >= 0).unsqueeze(1)
    return (torch.nn.functional.one_hot((weights.detach() - fast.route_margins).argmax(1), weights.shape[1]) * there).sum(0)


def scored(
    result: Result, labels: Any, metric: Metric | None, objective: Objective, where: str
) -> tuple[list[float] | None, float]:
    """Sum over the rows of every output's score, and the number of rows that have one.

    None and 0 where there is neither a metric nor a classification.
    """
    outputs = [output.detach() for output in outputs_of(result)]
    if metric is not None:
        rows = outputs[-1].shape[0]
        return [float(measure(metric, o, labels, rows, where).sum()) for o in outputs], float(rows)
    if labels is None or not classifies(objective):
        return None, 0.0
    labels = check_labels(outputs[-1], labels, where)
    pairs = [right(output, labels) for output in outputs]
    return [float(score.sum()) for score, _ in pairs], float(pairs[-1][1].sum())


def classifies(objective: Objective) -> bool:
    """Whether the objective reads labels as class indices."""
    if isinstance(objective, Sum):
        return all(classifies(part) for part in objective.parts)
    if isinstance(objective, Exits):
        return objective.distillation < 1
    return not isinstance(objective, PerExitLoss) and not (
        isinstance(objective, AdaLoss | Distillation) and objective.alpha == 1
    )
