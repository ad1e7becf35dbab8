"""`eecompile demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from eecompile.cli import options
from eecompile.cli.out import reporting


def demo(
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Save the program here too.")] = None,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Trains a small network on real digits, compiles it, fits, calibrates at 1% and shows the trade-off."""
    with reporting(as_json) as out:
        from eecompile.cli.digits_demo import demonstrate

        fast, report = demonstrate(None if as_json else out.console)
        if output is not None:
            fast.save(output)
        out.result(report.to_dict())
