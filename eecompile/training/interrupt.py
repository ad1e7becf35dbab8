"""Ctrl-C between two steps: the running step ends, a checkpoint is written, then KeyboardInterrupt goes
on."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from rich.console import Console
from rich.text import Text


class Interrupt:
    """While entered, the first Ctrl-C sets `requested`; a second one raises KeyboardInterrupt at once.

    Outside of the main thread Python delivers no signals, and nothing changes.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: Any = None
        self._installed = False

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._handle)
            self._installed = True
        return self

    def __exit__(self, *_: object) -> None:
        if self._installed:
            signal.signal(signal.SIGINT, signal.SIG_DFL if self._before is None else self._before)
            self._installed = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True


def say(text: str) -> None:
    """A message on standard error, past any progress bar."""
    Console(stderr=True).print(Text(text))
