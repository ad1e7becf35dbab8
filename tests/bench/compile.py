"""How long `eecompile()` takes on BERT-base, and where the time goes."""

from __future__ import annotations

import statistics
import time

from eecompile.measuring import Bystanders, summary
from tests.bench import models
from tests.bench.groups import Context
from tests.bench.record import Figure, Target

ROUNDS = 7
SECONDS = 180.0  # no further round is begun after that: the group has four minutes


def run(context: Context) -> list[Figure]:
    subject = models.lenet(4, 2, context.device) if context.small else models.bert(8, 128, 4, context.device, padded=True)
    totals: list[float] = []
    steps: dict[str, list[float]] = {}
    others = []
    models.lenet(4, 2, context.device).compile()  # imports
    began = time.perf_counter()
    for i in range(2 if context.small else ROUNDS):
        if i > 0 and time.perf_counter() - began > SECONDS:
            break
        marks: list[tuple[str, float]] = []
        bystanders = Bystanders()
        start = time.perf_counter()
        subject.compile(progress=lambda name, marks=marks: marks.append((name, time.perf_counter())))
        totals.append(time.perf_counter() - start)
        others.append(bystanders.share() or 0.0)
        ends = [*(t for _, t in marks[1:]), start + totals[-1]]
        for (name, begun), end in zip(marks, ends, strict=True):
            steps.setdefault(name, []).append(end - begun)
    value, spread = summary(totals)
    parts = {name: statistics.median(seconds) for name, seconds in steps.items()}
    figure = Figure(f"eecompile() on {subject.name}", value, "s", spread, len(totals), Target(10.0))
    figure.others = statistics.median(others)
    figure.detail = {"seconds by step": parts, "nodes": len(subject.fast.source_graph.graph.nodes)}
    if not figure.met:
        name, seconds = max(parts.items(), key=lambda item: item[1])
        figure.cause = f"{name} takes {seconds:.1f} s of it."
    return [figure]
