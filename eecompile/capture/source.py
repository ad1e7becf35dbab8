"""Which line of the user's model stopped the capture."""

from __future__ import annotations

import inspect
import os
import re
import traceback

import torch
from torch import nn

from eecompile.errors import CaptureError

_OURS = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_TORCH = os.path.dirname(os.path.abspath(torch.__file__))


def _files(model: nn.Module) -> set[str]:
    files = set()
    for m in model.modules():
        try:
            files.add(os.path.abspath(inspect.getfile(type(m))))
        except (TypeError, OSError):  # built-in or made in an interactive session
            continue
    return {f for f in files if not f.startswith(_TORCH)}


def line_of(model: nn.Module, error: BaseException) -> str | None:
    """`file:line in function: code` of the innermost frame that belongs to the model."""
    files = _files(model)
    seen: list[str] = []
    link: BaseException | None = error
    while link is not None:
        for frame in traceback.extract_tb(link.__traceback__):
            path = os.path.abspath(frame.filename)
            inside = path in files or (
                not path.startswith((_OURS, _TORCH)) and "site-packages" not in path and frame.name == "forward"
            )
            if inside:
                seen.append(f"{frame.filename}:{frame.lineno} in {frame.name}: {frame.line}")
        link = link.__cause__ or link.__context__
    if seen:
        return seen[-1]
    # torch.export also writes the user's stack into the message
    for match in reversed(re.findall(r'File "([^"]+)", line (\d+), in (\w+)', str(error))):
        if os.path.abspath(match[0]) in files:
            return f"{match[0]}:{match[1]} in {match[2]}"
    return None


def capture_failed(model: nn.Module, error: BaseException, attempts: list[str]) -> CaptureError:
    """The error for a model that cannot be exported."""
    first = next((x.strip() for x in str(error).splitlines() if x.strip()), type(error).__name__)
    return CaptureError(
        f"{type(model).__name__} could not be captured as one graph",
        where=line_of(model, error) or type(model).__name__,
        got=f"{type(error).__name__}: {first[:300]}" + (f" (tried {', '.join(attempts)})" if attempts else ""),
        wanted="a forward whose Python control flow does not depend on data or on the number of rows",
        hint='use capture="blocks" (exits at module boundaries, no trace), or rewrite that line',
    )
