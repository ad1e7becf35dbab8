"""What a monitor that keeps its state in a file adds to calls, beside the rows that also run to the end."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from eecompile.calibration.monitor import Monitor, MonitorOptions
from eecompile.strategies import Branchy
from tests.bench import models
from tests.bench.groups import Context
from tests.bench.record import Figure, Target, timed

ROWS, LEAVING = 32, (16, 8)


def watched(fast: Any, path: Path, shadow: float) -> Monitor:
    """A monitor of a module that was not calibrated."""
    guarantee = SimpleNamespace(
        target="agreement", rows=4, shares=[0.5, 0.25, 0.25], made_for={"weights": ""}, max_drop=0.9, disagreement=0.0,
        void=lambda fast: "",
    )  # fmt: skip
    return Monitor(_Guaranteed(fast, guarantee), MonitorOptions(shadow=shadow, limit=0.9), path=path)


class _Guaranteed:
    def __init__(self, fast: Any, guarantee: Any) -> None:
        self._fast, self.guarantee = fast, guarantee

    def __getattr__(self, name: str) -> Any:
        return getattr(self._fast, name)


def run(context: Context) -> list[Figure]:
    made = models.resnet(ROWS, Branchy(exits=(0.25, 0.5)), context.device)
    models.spread_out(made, 2.0)
    models.force_mix(made, LEAVING)
    with tempfile.TemporaryDirectory() as folder:
        never, some = (watched(made.fast, Path(folder) / f"{s}.json", s) for s in (1e-12, 0.01))
        rounds = context.measure(
            {
                "alone": lambda: made.fast.run(**made.inputs),
                "no shadow row": lambda: never.run(**made.inputs),
                "1% shadow rows": lambda: some.run(**made.inputs),
            },
            min_seconds=0.02,  # one call a turn: a difference of 1% needs many rounds, not long ones
        )
    target = Target(5.0 if context.small else 1.01)
    return [
        timed(f"{made.name}, monitor without a shadow row", rounds, "no shadow row", "alone", target),
        timed(f"{made.name}, monitor with 1% shadow rows", rounds, "1% shadow rows", "alone"),
    ]
