"""`doctor`: what is installed here, what works, and why the rest does not."""

from __future__ import annotations

from typing import Annotated

import typer

from eecompile.cli import options as o
from eecompile.cli.out import reporting

MARKS = {"ok": ("ok", "green"), "no": ("no", "yellow"), "broken": ("BROKEN", "bold red")}


def doctor(
    self_test: Annotated[bool, typer.Option(help="Compile, train, calibrate, save and load a tiny model.")] = True,
    as_json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Check this installation: versions, executors, operators, and a tiny model from end to end.

    Ends with 1 if something that eecompile needs is broken.
    """
    with reporting(as_json) as out:
        from rich.table import Table
        from rich.text import Text

        from eecompile.cli import checks

        found = checks.run(self_test)
        table = Table(title="eecompile doctor", title_justify="left")
        for column in ("check", "", "what"):
            table.add_column(column, overflow="fold")
        for check in found:
            mark, style = MARKS[check.state]
            table.add_row(Text(check.name), Text(mark, style), Text(check.detail))
        broken = [c.name for c in found if c.state == "broken"]
        out.show(table, f"broken: {', '.join(broken)}" if broken else "everything that eecompile needs works here")
        out.result({"ok": not broken, "checks": [vars(c) for c in found]})
        if broken:
            raise typer.Exit(1)
