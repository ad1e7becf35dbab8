"""Single calls under deadlines, on an idle machine and next to a process that keeps one core busy: how many are late."""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass

import torch

from eecompile import CompiledModule, eecompile, strategies
from eecompile.measuring import Bystanders, busy
from tests.bench import models
from tests.bench.groups import Context
from tests.bench.record import Figure, Target

CALLS, STEPS = 250, 7
LATE = 1.05  # a call is late that takes more than this times its deadline


def run(context: Context) -> list[Figure]:
    torch.manual_seed(0)
    subject = models.lenet(1, 1, context.device) if context.small else models.resnet(1, 1, context.device)
    strategy = strategies.Anytime(head="linear", max_head_share=9.0)
    fast = eecompile(subject.model, strategy, example_kwargs=subject.example())
    fast.set_thresholds(1.0)  # open, and hardly a row leaves by itself
    calls, steps = (8, 2) if context.small else (CALLS, STEPS)
    figures = []
    for load in ("idle", "one core busy"):
        with busy() if load != "idle" else contextlib.nullcontext(), torch.no_grad():
            fast.stage_times.forget()
            fast.measure_stages(**subject.inputs, rounds=10 if context.small else 60)
            bystanders = Bystanders()
            bystanders.start()
            swept = [sweep(fast, subject.inputs, d, calls) for d in deadlines(fast, steps)]
            share = bystanders.share()
        late = sum(s.late for s in swept) / (calls * steps)
        beyond = sum(s.beyond for s in swept) / (calls * steps)
        target = Target(1.0 if context.small else 0.02)
        figure = Figure(f"{subject.name}, {load}", late, "of the calls late", rounds=calls * steps, target=target)
        mine = 0.0 if load == "idle" else 1 / (os.cpu_count() or 1)  # of the process that keeps a core busy
        figure.others = None if share is None else max(share - mine, 0.0)
        figure.detail = {
            "deadlines, ms": [s.deadline for s in swept],
            "mean exit": [s.exit for s in swept],
            "late": [s.late / calls for s in swept],
            "late after a later exit than the first": beyond,
            "exits": len(fast.exits),
        }
        if not figure.met:
            figure.cause = f"{late - beyond:.1%} of all calls were late at their first exit already, {beyond:.1%} after it."
        figures.append(figure)
    return figures


@dataclass(frozen=True)
class Swept:
    deadline: float
    late: int
    beyond: int
    exit: float


def deadlines(fast: CompiledModule, steps: int) -> list[float]:
    """From what the first exit safely takes to a little more than the whole model does, milliseconds, as just measured."""
    pieces = {(p["from"], p["to"]): p for p in fast.stage_times.to_dict()}
    end = pieces.pop((-2, -2))["predicted_ms"]
    lowest = 1.5 * (pieces[(-1, 0)]["predicted_ms"] + end)
    highest = max(1.3 * sum(p["median_ms"] for p in pieces.values()), 2 * lowest)
    return [round(lowest + (highest - lowest) * k / (steps - 1), 3) for k in range(steps)]


def sweep(fast: CompiledModule, inputs: dict[str, torch.Tensor], deadline: float, calls: int) -> Swept:
    late = beyond = 0
    depth = 0.0
    for _ in range(calls):
        started = time.perf_counter()
        r = fast.run(**inputs, deadline_ms=deadline)
        over = (time.perf_counter() - started) * 1e3 / deadline > LATE
        depth += float(r.exit_index) / calls
        late += over
        beyond += over and int(r.exit_index) > 0
    return Swept(deadline, late, beyond, depth)
