"""The result of a call: output, exits, choices and costs of its rows, and what training reads of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from eecompile.costs import CostModel
from eecompile.ir.settings import GATES, THRESHOLDS_BUFFER, Settings
from eecompile.passes.training_decisions import TrainMode, full_rows
from eecompile.program import Program
from eecompile.reasons import Reason
from eecompile.runtime.outcome import Outcome


@dataclass
class Choices:
    """What was chosen inside the model for each row; None where nothing is chosen.

    Attributes:
        gates: [B, G] bool, whether the gate let the row in (False too where the row had exited before); in train mode 1 and
            0, differentiable by the straight-through estimate.
        widths: [B, W] float32: the share of the channels that each part in `fast.widths` ran with; 0 where it was skipped or
            the row had exited before.
        steps: [B] or [B, S] int64 ([B, 1] where no row reached the end of the chain): steps taken, where the strategy halts,
            summed over several chains; where gates are on whole blocks [B], how many of those ran.
        route: [B] int64: the exit that the row was sent to, or the branch that it took, -1 where it had exited before. In
            train mode as decisions were taken meanwhile.
    """

    gates: Tensor | None = None
    widths: Tensor | None = None
    steps: Tensor | None = None
    route: Tensor | None = None


@dataclass
class Stop:
    """Whether a call was stopped before its end.

    Attributes:
        final: [B] bool; rows that exited by themselves. The others were stopped at `exit_index` by a deadline, a budget or
            an interrupt, or are still on their way in a stream.
        reason: Why the call was stopped before every row was final: "deadline", "budget" or "interrupt"; else None.
            After a budget on a device that decides by itself, reading it waits for the device.
        late: Whether the output came after its deadline, or costs more than its budget: even the first exit was too far.
    """

    final: Tensor | None = None
    reason: Reason = Reason()  # noqa: RUF009 (a descriptor, not a default)
    late: bool = False


@dataclass
class Trace:
    """What training and calibration read, in train mode and of `fast.observe`; None where there is nothing of its kind.

    Attributes:
        outputs: The prediction of every exit and, last, of the model itself; each `[B, ..., C]`.
        confidences: [B] float32 of every exit and, last, of the model itself.
        separate: Where exits are combined: the output of each head by itself and, last, the model's.
        scores: For learned criteria: the exit score's logit `[B]` of every exit; for a router its probabilities.
        gate_scores: [B, G] in [0, 1].
        gates_free: [B, G] bool: whether the gate's own score decided. Not where a threshold keeps it open or closed,
            `min_open` forces it open, or an earlier closed gate closes it.
        end_cost: [B] float32, with gates or branches: the cost of each row with its gates and its route as they were decided
            and all exits closed, differentiable in train mode.
        route_weights: [B, K] float32: the probability of every route, differentiable.
        route_costs: [K] float32: cost of a row on each route.
        route_outputs: The prediction had every row taken route k, for each of K: of a router to exits, and of one to
            branches with `gate_mode = "every"`, then without gradients.
        ponder: [B] or [B, S] float32: ponder cost N + R, differentiable in train mode; of eval mode too.
        step_outputs: In train mode, where scores are probabilities of stopping (PonderNet): the prediction `[B, ..., C]` had
            every row stopped at each of the N steps. No row stops earlier then: `steps` is N, and `ponder` means nothing.
        step_scores: [B, N] float32, with `step_outputs`: probability of stopping at a step, of a row that got there.
    """

    outputs: tuple[Tensor, ...] | None = None
    confidences: tuple[Tensor, ...] | None = None
    separate: tuple[Tensor, ...] | None = None
    scores: tuple[Tensor, ...] | None = None
    gate_scores: Tensor | None = None
    gates_free: Tensor | None = None
    end_cost: Tensor | None = None
    route_weights: Tensor | None = None
    route_costs: Tensor | None = None
    route_outputs: tuple[Tensor, ...] | None = None
    ponder: Tensor | None = None
    step_outputs: tuple[Tensor, ...] | None = None
    step_scores: Tensor | None = None


@dataclass
class Result:
    """What `fast.run(x)` gives.

    Attributes:
        output: The same type as `model(x)`.
        exit_index: [B] int64; counts exits from 0, the model's own end is `len(fast.exits)`.
        confidence: [B] float32 in [0, 1]; of the exit that was taken, or of the model's own output.
        cost: [B] float32; fraction of the full model's FLOPs spent on each row.
        choices: What was chosen inside the model; `gates`, `widths`, `steps` and `route` are read off it.
        stop: Whether the call was stopped; `final`, `stopped` and `late` are read off it.
        trace: What training reads; `outputs` and `confidences` are read off it.
    """

    output: Any
    exit_index: Tensor
    confidence: Tensor
    cost: Tensor
    choices: Choices = field(default_factory=Choices)
    stop: Stop = field(default_factory=Stop)
    trace: Trace = field(default_factory=Trace)

    def __repr__(self) -> str:
        """Rows, where they exited, what they cost, and the shapes of what else there is; the values are in the fields."""
        exited = dict(sorted(Counter(self.exit_index.tolist()).items()))
        cost, confidence = (float(t.detach().mean()) for t in (self.cost, self.confidence))
        parts = [f"rows={len(self.exit_index)}", f"exit_index={exited}", f"mean_cost={cost:.3f}"]
        parts += [f"mean_confidence={confidence:.3f}", f"output={_shapes(self.output)}"]
        parts += [f"{name}={list(t.shape)}" for name, t in vars(self.choices).items() if t is not None]
        parts += [f"stopped={self.stopped!r}"] if self.stopped is not None else []
        traced = [name for name, value in vars(self.trace).items() if value is not None]
        return f"Result({', '.join([*parts, *([f'trace={traced}'] if traced else [])])})"

    @property
    def gates(self) -> Tensor | None:
        """[B, G], see `Choices.gates`."""
        return self.choices.gates

    @property
    def widths(self) -> Tensor | None:
        """[B, W], see `Choices.widths`."""
        return self.choices.widths

    @property
    def steps(self) -> Tensor | None:
        """[B] or [B, S], see `Choices.steps`."""
        return self.choices.steps

    @property
    def route(self) -> Tensor | None:
        """[B], see `Choices.route`."""
        return self.choices.route

    @property
    def final(self) -> Tensor | None:
        """[B] bool, see `Stop.final`."""
        return self.stop.final

    @property
    def stopped(self) -> str | None:
        """Why the call was stopped, see `Stop.reason`."""
        return self.stop.reason

    @property
    def late(self) -> bool:
        """Whether the output came too late, see `Stop.late`."""
        return self.stop.late

    @property
    def outputs(self) -> tuple[Tensor, ...] | None:
        """In train mode and of `fast.observe`: predictions of every exit and of the model."""
        return self.trace.outputs

    @property
    def confidences(self) -> tuple[Tensor, ...] | None:
        """In train mode and of `fast.observe`: [B] of every exit and of the model."""
        return self.trace.confidences


def _shapes(output: Any) -> str:
    """A type with the shapes of its tensors."""
    if isinstance(output, Tensor):
        return f"{str(output.dtype).removeprefix('torch.')}{list(output.shape)}"
    items = output.items() if isinstance(output, Mapping) else enumerate(output) if isinstance(output, Sequence) else ()
    return f"{type(output).__name__}({', '.join(f'{k}: {_shapes(v)}' for k, v in items)})"


def result_of(
    costs: CostModel, outcome: Outcome, settings: Settings, flat: Sequence[Tensor], mode: TrainMode | None
) -> Result:
    """The result of one call.

    Args:
        settings: Those that the call ran under.
        flat: Its inputs.
        mode: How it was trained; None in eval mode.
    """
    program, index = costs.program, outcome.exit_index
    gates = _of_gates(program, outcome, "") if program.choices.gates else None
    if gates is not None and mode is None:  # nothing runs of a cascade's model while its exits are closed
        is_open = costs.is_open(settings)
        gates = gates * costs.constant([costs.runs(g.node, is_open) for g in program.choices.gates], gates.device)
    steps = _steps_ran(costs, settings, outcome, mode is not None)
    route = _route(program, outcome, settings)
    mixed = mode is not None and mode.gates == "soft"
    branches = None if route is None else _branches(program, outcome.reports, route, mixed)
    ran = [r for r in (gates, *steps, branches) if r is not None]
    result = Result(
        output=program.restore(outcome.leaves, flat),
        exit_index=index,
        confidence=outcome.confidence if outcome.confidence is not None else torch.zeros(()),
        cost=costs.spent(settings, index, ran),
        choices=Choices(
            gates=gates if gates is None or mode is not None else gates >= 0.5,
            widths=_widths_ran(costs, gates, index) if gates is not None and program.choices.widths else None,
            steps=_gated_steps(costs, gates),
            route=route,
        ),
        stop=Stop(
            torch.ones_like(index, dtype=torch.bool) if outcome.final is None else outcome.final,
            outcome.stopped,
            outcome.late,
        ),
    )
    trace = result.trace
    if steps:
        result.choices.steps, trace.ponder = _halting(program, outcome, steps, mode is not None)
    if outcome.outputs is None:
        return result
    if gates is not None:
        curriculum = mode or TrainMode()
        trace.gate_scores = _of_gates(program, outcome, ".score")
        trace.gates_free = gates_free(costs, settings, gates, curriculum.kept_open, curriculum.full_share)
    if gates is not None or branches is not None:
        trace.end_cost = costs.at_end(settings, index, ran)
    if program.choices.route is not None:
        trace.route_weights = outcome.reports[f"{program.choices.route.name}.weights"]
        trace.route_costs = costs.at_routes(settings)
    if outcome.step_scores is not None:
        trace.step_outputs = (*outcome.step_outputs, outcome.outputs[-1])
        trace.step_scores = outcome.step_scores.float()
    if outcome.confidences is not None:
        trace.outputs, trace.separate = outcome.outputs, outcome.separate
        trace.confidences = tuple(torch.nan_to_num(c, nan=0.0) for c in outcome.confidences)
        trace.scores = None if outcome.scores is None else tuple(s.flatten() for s in outcome.scores)
        if program.exits and program.exits[0].routed:  # no function of the outputs: kept as they are
            trace.scores, trace.route_outputs = trace.confidences[:-1], outcome.outputs
    return result


def _halting(program: Program, outcome: Outcome, steps: Sequence[Tensor], training: bool) -> tuple[Tensor, Tensor]:
    """Steps and ponder cost; a row that exited inside a chain has the steps that it ran, and no ponder cost of it."""
    ledgers = [outcome.reports[h.name] for h in program.choices.chains]
    counts = []
    for h, ledger, ran in zip(program.choices.chains, ledgers, steps, strict=True):
        count, taken = ledger.detach()[..., 1], (ran > 0).sum(1).to(ledger.dtype)
        exited = torch.zeros_like(taken, dtype=torch.bool)
        if not training:
            exited = (outcome.exit_index < program.choices.stage_of(h.output)) | (ran[:, 0] == 0)
        rows = (-1, *(1,) * (count.ndim - 1))
        counts.append(torch.where(exited.view(rows), taken.view(rows), count))
    ran_at_all = [r[:, 0].view(-1, *(1,) * (ledger.ndim - 2)) for r, ledger in zip(steps, ledgers, strict=True)]
    ponder = torch.stack([ledger[..., 2] * r for r, ledger in zip(ran_at_all, ledgers, strict=True)]).sum(0)
    return torch.stack(counts).sum(0).long(), ponder


def _of_gates(program: Program, outcome: Outcome, suffix: str) -> Tensor:
    """[B, G] what every gate reports."""
    return torch.stack([outcome.reports[g.name + suffix] for g in program.choices.gates], 1)


def _steps_ran(costs: CostModel, settings: Settings, outcome: Outcome, training: bool) -> list[Tensor]:
    """Of every chain that halts [B, K], 1 for a step that ran, where positions halt one by one the share of those that had
    not: the first one for every row that reached it."""
    found = []
    is_open, choices = costs.is_open(settings), costs.program.choices
    for h in choices.chains:
        first = (outcome.exit_index >= choices.stage_of(h.ys[0])).float()
        ran = torch.stack([outcome.reports[s.name].float() if s.carries else first for s in h.steps], 1).detach()
        found.append(ran if training or costs.runs(h.output, is_open) else torch.zeros_like(ran))
    return found


def _widths_ran(costs: CostModel, gates: Tensor, exit_index: Tensor) -> Tensor:
    """[B, W] float32: the share of the channels that each part with widths ran with; 0 where it was skipped or the row
    had exited before. `gates` [B, G], 1 for open."""
    choices = costs.program.choices
    index = {g.name: i for i, g in enumerate(choices.gates)}
    found = []
    for w in choices.widths:
        mine = costs.constant([index[g] for g in w.gates], gates.device, torch.int64)
        opened = (gates.detach()[:, mine] >= 0.5).long().sum(1)
        shares = costs.constant([0.0, *w.fractions] if w.skips else w.fractions, gates.device)
        found.append(shares[opened] * (exit_index >= choices.stage_of(choices.gates[index[w.gates[0]]].decision)))
    return torch.stack(found, 1)


def gates_free(costs: CostModel, settings: Settings, gates: Tensor, kept_open: int = 0, full_share: float = 0.0) -> Tensor:
    """[B, G] bool: where the gate's own score decided; see `Trace.gates_free`.

    Args:
        gates: [B, G], 1 for open.
        kept_open: How many gates do not decide, in training.
        full_share: Share of the rows that all gates let in, in training.
    """
    choices = costs.program.choices
    opened = gates.detach() >= 0.5
    scored = [0 < t <= 1 and i >= kept_open for i, t in enumerate(settings[GATES])]
    free = costs.constant(scored, gates.device, torch.bool).expand(opened.shape).clone()
    free = free & ~full_rows(gates.shape[0], full_share, gates.device).unsqueeze(1)
    for group, recipe in enumerate(choices.gate_recipes):
        if not recipe.min_open:
            continue
        # Gates that open a width are not counted: what they are part of runs already.
        flags = [g.group == group and g.kind != "width" for g in choices.gates]
        counted = costs.constant(flags, gates.device, torch.bool)
        later = counted.long().flip(0).cumsum(0).flip(0) - counted.long()
        mine = (opened & counted).long()
        free = free & ((mine.cumsum(1) - mine >= recipe.min_open - later) | ~counted)
    names = [g.name for g in choices.gates]
    for i, g in enumerate(choices.gates):
        if g.needs:
            free[:, i] &= opened[:, names.index(g.needs)]
    return free


def _gated_steps(costs: CostModel, gates: Tensor | None) -> Tensor | None:
    """[B] int64: gated blocks that ran for each row; None where gates are on parts of blocks."""
    kinds = [g.kind for g in costs.program.choices.gates]
    blocks = [i for i, kind in enumerate(kinds) if kind in ("block", "branch")]
    if gates is None or not blocks or any(kind not in ("block", "branch", "width") for kind in kinds):
        return None
    return (gates[:, costs.constant(blocks, gates.device, torch.int64)] >= 0.5).sum(1)


def _route(program: Program, outcome: Outcome, settings: Settings) -> Tensor | None:
    """[B] int64, the route of each row; -1 for rows that had exited before. None without a router."""
    route = program.choices.route
    if route is None:
        return None
    choice = outcome.reports[route.name].detach()
    if route.to_exits:  # the first open exit that the router is sure enough of
        thresholds = settings.tensors(choice.device)[THRESHOLDS_BUFFER]
        sent = torch.cat((choice >= thresholds, torch.ones_like(choice[:, :1], dtype=torch.bool)), 1)
        return sent.to(torch.uint8).argmax(1)
    return choice.long().masked_fill(outcome.exit_index < program.choices.stage_of(route.node), -1)


def _branches(program: Program, reports: Mapping[str, Tensor], route: Tensor, mixed: bool) -> Tensor | None:
    """[B, K] how much of each branch every row took: 0 and 1 with the gradient of the decision, or mixed weights.

    None without branches.
    """
    r = program.choices.route
    if r is None or r.to_exits:
        return None
    admitted = reports.get(f"{r.name}.admitted")
    if mixed and admitted is not None:
        return admitted
    hard = torch.nn.functional.one_hot(route.clamp_min(0), len(r.ways)).float()
    hard = hard * (route >= 0).unsqueeze(1)
    return hard if admitted is None else hard + admitted - admitted.detach()
