"""The command line, `eecompile`. Nothing heavy is imported until a command runs."""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command and ends the process: 0 well, 2 a mistake in what was asked, 1 a bug, 130 Ctrl-C.

    Args:
        argv: Arguments without the program's name; those of the process by default.
    """
    from eecompile.cli.app import app

    app(args=None if argv is None else list(argv), prog_name="eecompile")


__all__ = ["main"]
