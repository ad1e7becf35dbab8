"""The plots of the page, each a matplotlib figure of what was gathered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import cycle
from typing import Any

import torch

from eecompile.errors import MissingDependencyError
from eecompile.report.gather import Gathered, frontier

BINS = 10
COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2", "#97bbf5", "#9c6b4e", "#9498a0")

Place = tuple[str, float, float]  # name, cost, accuracy


def new_axes(count: int = 1) -> tuple[Any, list[Any]]:
    """A figure of so many plots next to each other, and their axes.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise MissingDependencyError("plots need matplotlib", hint="pip install 'eecompile[report]'") from e
    figure = Figure(figsize=(4.5 * count, 3.2), layout="constrained")
    every = figure.subplots(1, count, squeeze=False)[0].tolist()
    for axes in every:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, every


def accuracy_against_cost(found: Gathered) -> Any:
    """Every exit for all rows, a random choice among them, and the calibrated point."""
    figure, (axes,) = new_axes()
    e = found.evaluation
    exits = [(r.name, r.cost, r.accuracy_if_all) for r in e.rows if r.accuracy_if_all is not None]
    trade_off(axes, exits, [("as the thresholds are now", e.mean_cost, float(e.accuracy or 0.0))])
    axes.legend(fontsize=9, frameon=False)
    return figure


def trade_off(
    axes: Any,
    constants: Sequence[Place],
    chosen: Sequence[Place],
    *,
    curve: Sequence[tuple[float, float]] = (),
    static: Sequence[Place] = (),
) -> None:
    """Draws accuracy against cost on ``axes``: decisions made for each row beside those that are not.

    Args:
        constants: Choices that are the same for all rows; also drawn is the best random one among them at each cost.
        chosen: Points at which decisions are made for each row, named in the legend.
        curve: Cost and accuracy of further such points, joined by a line.
        static: Smaller models without decisions.
    """
    points = [(cost, accuracy) for _, cost, accuracy in constants]
    grid = torch.linspace(min(c for c, _ in points), max(c for c, _ in points), 60).tolist()
    axes.plot(grid, [frontier(points, c) for c in grid], color="#9498a0", label="random choice")
    axes.plot(*zip(*points, strict=True), "o", color=COLOURS[0], label="same choice for all rows")
    if curve:
        axes.plot(*zip(*curve, strict=True), color=COLOURS[2], linewidth=1, label="one threshold for all exits")
    if static:
        axes.plot([c for _, c, _ in static], [a for *_, a in static], "^", color=COLOURS[4], label="smaller model")
    for name, cost, accuracy in (*constants, *static):
        axes.annotate(name, (cost, accuracy), fontsize=9, xytext=(4, -12), textcoords="offset points")
    for marker, (name, cost, accuracy) in zip(cycle("*PXD"), chosen, strict=False):
        axes.plot([cost], [accuracy], marker, color=COLOURS[2], markersize=13 if marker == "*" else 9, label=name)
    axes.margins(x=0.14, y=0.14)  # room for the names
    axes.set(xlabel="mean cost, fraction of the full model's FLOPs", ylabel="accuracy")


def exits_by_class(found: Gathered) -> Any:
    """Share of the rows of each class that leave at each exit."""
    classes = sorted(set(found.labels.tolist()))
    return _shares(found, [str(c) for c in classes], [found.labels == c for c in classes], "class")


def exits_by_difficulty(found: Gathered) -> Any:
    """The same by how sure the full model is, in five equal parts from the easiest rows on."""
    order = found.confidences[:, -1].argsort(descending=True)
    parts = [torch.zeros(len(order), dtype=torch.bool) for _ in range(5)]
    for mask, rows in zip(parts, order.chunk(5), strict=False):
        mask[rows] = True
    names = ["easiest", "2", "3", "4", "hardest"]
    return _shares(found, names, parts, "rows by the full model's confidence")


def _shares(found: Gathered, names: list[str], masks: list[torch.Tensor], about: str) -> Any:
    figure, (axes,) = new_axes()
    bottom = torch.zeros(len(names))
    for k, exit in enumerate(found.names):
        share = torch.tensor([float((found.index[m] == k).float().mean()) if bool(m.any()) else 0.0 for m in masks])
        axes.bar(names, share.tolist(), bottom=bottom.tolist(), color=COLOURS[k % len(COLOURS)], label=exit)
        bottom += share
    axes.set(xlabel=about, ylabel="share of rows", ylim=(0, 1))
    axes.legend(fontsize=9, frameon=False, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure


def latency(found: Gathered) -> Any:
    """Time of single rows by the exit that they left at, and of the original model."""
    figure, (axes,) = new_axes()
    boxes = {name: [1e3 * s for s in seconds] for name, seconds in found.seconds.items()}
    if found.original_seconds:
        boxes["original"] = [1e3 * s for s in found.original_seconds]
    axes.boxplot(list(boxes.values()), showfliers=False)
    axes.set_xticks(range(1, len(boxes) + 1), [f"{name}\n{len(values)} rows" for name, values in boxes.items()], fontsize=9)
    axes.set(ylabel="milliseconds, batch 1", ylim=(0, None))
    return figure


def reliability(found: Gathered) -> Any:
    """Share of right answers against confidence, for each exit."""
    figure, (axes,) = new_axes()
    axes.plot([0, 1], [0, 1], color="#9498a0", linewidth=1)
    for k, name in enumerate(found.names):
        sure, right = found.confidences[:, k], found.right[:, k].float()
        bins = (sure.clamp(0, 1 - 1e-6) * BINS).long()
        filled = [b for b in range(BINS) if bool((bins == b).any())]
        xs = [float(sure[bins == b].mean()) for b in filled]
        axes.plot(
            xs, [float(right[bins == b].mean()) for b in filled], "o-", markersize=3, color=COLOURS[k % 10], label=name
        )
    axes.set(xlabel="confidence", ylabel="share right", xlim=(0, 1), ylim=(0, 1.02))
    axes.legend(fontsize=9, frameon=False)
    return figure


PLOTS: dict[str, tuple[str, Callable[[Gathered], Any]]] = {
    "accuracy": ("Accuracy against cost", accuracy_against_cost),
    "classes": ("Exits by class", exits_by_class),
    "difficulty": ("Exits by difficulty", exits_by_difficulty),
    "latency": ("Latency by exit", latency),
    "reliability": ("Reliability", reliability),
}
