"""What a command writes: one report on standard output, everything else on standard error."""

from __future__ import annotations

import contextlib
import functools
import json
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import typer
from rich.console import Console, RenderableType
from rich.text import Text

from eecompile.errors import EecompileError

P = ParamSpec("P")
R = TypeVar("R")


class Out:
    """The two streams of a command.

    Args:
        as_json: Standard output holds one JSON document and nothing else.
    """

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self.console = Console(file=sys.stdout)
        self.progress = Console(file=sys.stderr)

    def say(self, text: str) -> None:
        """Progress, for people."""
        self.progress.print(Text(text, "dim"), soft_wrap=True)

    def state(self, fast: Any) -> None:
        """What makes figures mean little: exits and gates that are not trained, and a guarantee that is void."""
        void = fast.guarantee.void(fast) if fast.guarantee is not None else ""
        if void:
            self.progress.print(Text(f"the guarantee is void: {void}; eecompile calibrate makes a new one", "yellow"))
        if fast.untrained:
            self.progress.print(Text(f"not trained yet: {', '.join(fast.untrained)}; eecompile fit trains them", "yellow"))

    def show(self, *renderables: RenderableType) -> None:
        """A part of the report; nothing when the report is JSON."""
        if not self.as_json:
            for r in renderables:
                self.console.print(Text(r) if isinstance(r, str) else r, soft_wrap=type(r).__name__ == "Raw")

    def after(self, saved: object, command: str | None = None) -> None:
        """Where the program was saved and what to type next, in lines that are never broken."""
        if not self.as_json:
            lines = [f"saved in {saved}", *([f"next: {command}"] if command else [])]
            self.console.print(Text("\n".join(lines)), soft_wrap=True)

    def todo(self, *parts: list[str]) -> None:
        """Lines to be copied, which are never broken."""
        if not self.as_json:
            for part in parts:
                self.console.print(Text("\n".join(part)), soft_wrap=True)

    def result(self, data: dict[str, Any]) -> None:
        """The report as data; written only when JSON was asked for."""
        if self.as_json:
            self.console.file.write(json.dumps(data, indent=2, allow_nan=False) + "\n")


@contextlib.contextmanager
def reporting(as_json: bool) -> Iterator[Out]:
    """Streams of a command; with JSON, what user code prints goes to standard error."""
    out = Out(as_json)
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        yield out


def guarded(command: Callable[P, R]) -> Callable[P, R]:
    """Turns errors of a command into messages and exit codes; a traceback only where `--debug` is given."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        debug = bool(kwargs.get("debug"))
        try:
            return command(*args, **kwargs)
        except KeyboardInterrupt as error:
            complain("interrupted", "yellow")
            raise typer.Exit(130) from error
        except EecompileError as error:
            if debug:
                traceback.print_exc()
            complain(f"error: {error}")
            raise typer.Exit(2) from error
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except Exception as error:
            if debug:
                traceback.print_exc()
            first = next(iter(str(error).strip().splitlines()), "")
            complain(f"unexpected {type(error).__name__}: {first}")
            if not debug:
                complain("  next:   run again with --debug for the traceback; this may be a bug of eecompile", "")
            raise typer.Exit(1) from error

    return run


def complain(text: str, style: str = "red") -> None:
    """A message on standard error, in colour on a terminal."""
    Console(file=sys.stderr).print(Text(text, style), soft_wrap=True)
