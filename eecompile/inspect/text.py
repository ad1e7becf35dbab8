"""Small pieces that every format writes with: bars, shapes, numbers, and text that is never wrapped."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.segment import Segment
from rich.style import Style

from eecompile.criteria import Criterion
from eecompile.program import Live

BAR = 20


@dataclass(frozen=True)
class Raw:
    """Lines that are written as they are, however narrow the terminal: code, diffs, graph descriptions.

    Attributes:
        text: The lines.
        styles: (start of a line, style) for colour on a terminal, first match wins.
    """

    text: str
    styles: tuple[tuple[str, str], ...] = ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        text = plain(self.text) if options.ascii_only else self.text
        for line in text.splitlines():
            style = next((s for start, s in self.styles if line.startswith(start)), None)
            yield Segment(line, None if style is None else Style.parse(style))
            yield Segment.line()


def written(renderable: RenderableType, width: int = 110, ascii_only: bool = False) -> str:
    """A renderable as plain text without colour."""
    # An encoding, and not only text in memory: rich draws with the characters that it takes.
    file = io.TextIOWrapper(io.BytesIO(), "ascii" if ascii_only else "utf-8", "replace", newline="\n")
    console = Console(file=file, width=width, force_terminal=False, color_system=None, legacy_windows=False)
    console.print(renderable, soft_wrap=isinstance(renderable, Raw))
    file.seek(0)
    return file.read().rstrip("\n")


def plain(text: str) -> str:
    """Text in ASCII: what cannot be written becomes `?`."""
    return text.encode("ascii", "replace").decode()


def bar(share: float, ascii_only: bool, width: int = BAR) -> str:
    """A share of 1 as a bar; anything above 0 shows."""
    full = round(min(max(share, 0.0), 1.0) * width)
    return ("#" if ascii_only else "\u2588") * (full or (1 if share > 0.002 else 0))


def percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def sizes(shape: Sequence[int | str]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def live(v: Live) -> str:
    """A surviving value: name, dtype, shape, batch axis."""
    axis = "no batch" if v.batch_axis is None else f"batch axis {v.batch_axis}"
    return f"{v.node}: {v.dtype}{sizes(v.shape)} ({axis})"


def flops(number: float) -> str:
    for unit, size in (("GFLOPs", 1e9), ("MFLOPs", 1e6), ("kFLOPs", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f} FLOPs"


def seconds(number: float) -> str:
    return f"{1e3 * number:.1f} ms" if number < 1 else f"{number:.2f} s"


def criterion(c: Criterion) -> str:
    """A criterion with what differs from the usual."""
    extra = f", {c.patience} in agreement" if c.stateful else ""
    return c.name + (f"{extra}, {c.reduce} over positions" if c.reduce != "min" else extra)


def condition(c: Criterion, threshold: float, classes: int | str) -> str:
    """When a row exits, in the terms of the criterion's paper; where these differ from the confidence, both are given.

    Args:
        classes: Size of the last axis of the prediction.
    """
    over = "labels" if c.multi_label else "positions"
    extra = f", {c.reduce} over {over}" if c.multi_label or c.reduce != "min" else ""
    classes = 2 if c.multi_label or classes == 1 else classes
    sure = f"confidence >= {threshold:.4g}"
    count = float(classes) if isinstance(classes, int) else math.nan
    if c.name == "entropy":
        return f"entropy <= {max(0.0, 1 - threshold) * math.log(count):.4g} (1 - entropy / log {classes} as {sure}){extra}"
    if c.name == "energy":
        scaled = 2 * threshold - 1
        bound = math.inf if abs(scaled) >= 1 else scaled / (1 - abs(scaled))
        bound = math.copysign(bound, scaled) + math.log(count)
        return f"energy <= {-bound:.4g} ({sure}){extra}"
    if c.stateful:
        agree = max(1, math.ceil(threshold * c.patience - 1e-6))
        return f"{agree} open exit{'s agree' if agree > 1 else ' has answered'} ({c.name} as {sure}){extra}"
    return f"{criterion(c)} >= {threshold:.4g}"
