"""What torch.export says by itself: warnings about its own workings, and a failed trace on standard error.

None of it helps a user: what failed is in the CaptureError, with the line of the model that stopped the trace.
"""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import warnings
from collections.abc import Iterator

LOGGERS = ("torch.export", "torch.export._trace", "torch.fx.experimental.symbolic_shapes", "torch._subclasses.fake_tensor")
WARNINGS = (
    "The tensor attributes? .*assigned during export",  # an LSTM's list of its own weights
    "The PyTorch API of nested tensors is in prototype stage",
    "Converting a tensor with requires_grad=True to a scalar",
    "The given buffer is not writable",  # torch.export.load of torch 2.11 on its own archive
)


class _WithoutGraphs(io.TextIOBase):
    """Standard error without the partial graph that torch.export prints when it fails; all else goes on."""

    def __init__(self, stream: io.TextIOBase) -> None:
        self.stream = stream
        self.dropped = False

    def write(self, text: str) -> int:
        end_of_dropped = self.dropped and text == "\n"  # print() writes the end of the line by itself
        self.dropped = "def forward(self, arg" in text
        return len(text) if self.dropped or end_of_dropped else self.stream.write(text)

    def flush(self) -> None:
        self.stream.flush()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences torch.export's own reports; the model's prints, logs and other warnings come through."""
    loggers = [(logging.getLogger(name), logging.getLogger(name).level) for name in LOGGERS]
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        for message in WARNINGS:
            warnings.filterwarnings("ignore", message=message)
        if sys.stderr is not None:  # a program without a console has none
            stack.enter_context(contextlib.redirect_stderr(_WithoutGraphs(sys.stderr)))  # type: ignore[arg-type]
        for logger, _ in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in loggers:
                logger.setLevel(level)
