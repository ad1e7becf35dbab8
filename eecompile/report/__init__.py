"""One page about a compiled module: accuracy against cost, where rows exit, latency, reliability, the graph, examples."""

from __future__ import annotations

from eecompile.report.page import KINDS, plot, report

__all__ = ["KINDS", "plot", "report"]
