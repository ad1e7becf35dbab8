"""`backend="inductor"`: the rewritten stages through torch.compile, against torch.compile of the original.

Both are compiled with a free batch size and from an empty cache. Compilation is timed once: it takes minutes.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch

from eecompile.measuring import Bystanders
from tests.bench import models
from tests.bench.groups import Context
from tests.bench.record import Figure, timed


def run(context: Context) -> list[Figure]:
    subject = models.lenet(8, 1, context.device) if context.small else models.resnet(64, 2, context.device)
    with tempfile.TemporaryDirectory() as empty:
        before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = empty
        try:
            return measured(subject, context)
        finally:
            torch._dynamo.reset()
            os.environ.pop("TORCHINDUCTOR_CACHE_DIR")
            if before is not None:
                os.environ["TORCHINDUCTOR_CACHE_DIR"] = before


def measured(subject: models.Subject, context: Context) -> list[Figure]:
    optimised = torch.compile(subject.model, dynamic=True)

    def original() -> Any:
        return optimised(**subject.inputs)

    seconds = {"torch.compile of the original": first_call(original)}
    fast = subject.compile(backend="inductor")

    def rewritten() -> Any:
        return fast(**subject.inputs)

    figures = []
    for name, thresholds in (("exits closed", models.CLOSED), ("exits open, no row leaves", models.NO_EXIT)):
        fast.set_thresholds(thresholds)
        seconds[name] = first_call(rewritten)
        rounds = context.measure(
            {"torch.compile of the original": original, "rewritten": rewritten, "original": subject.original}
        )
        figure = timed(f"{subject.name}, {name}", rounds, "rewritten", "torch.compile of the original")
        figure.detail = {"against the eager original": rounds.ratio("rewritten", "original")[0]}
        figures.append(figure)
    first = [Figure(f"{subject.name}, first call, {name}", took[0], "s", others=took[1]) for name, took in seconds.items()]
    return figures + first


def first_call(call: Callable[[], Any]) -> tuple[float, float | None]:
    bystanders = Bystanders()
    start = time.perf_counter()
    with torch.no_grad():
        call()
    return time.perf_counter() - start, bystanders.share()
