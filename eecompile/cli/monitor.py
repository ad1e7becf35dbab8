"""`monitor`: what a monitor has seen."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from eecompile.cli import options as o
from eecompile.cli.out import reporting


def monitor(
    log: Annotated[Path, typer.Argument(metavar="LOG", help="A state that fast.monitor(path=LOG) keeps.")],
    as_json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Print what a monitor has seen: the mix of exits, how many early answers differ, the wealth over time, alarms."""
    with reporting(as_json) as out:
        from eecompile.calibration.monitor import read_state

        state = read_state(log)
        out.show(state)
        out.result(state.to_dict())
