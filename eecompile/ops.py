"""The vocabulary: importing this module registers `torch.ops.eecompile.*`.

The names below are the plain torch definitions. They copy nothing that they need not copy, and executors call
them directly; in graphs stand the operators of the same names, each with a fake implementation and a
gradient.

`decide`, `tick`, `gather`, `scatter`, `open_rows`, `pool_gate` and `head_confidence` are what executors are made of:
they write into buffers (but for `head_confidence`), have no gradient, and run as Triton kernels where those can run.
"""

from eecompile.kernels.blank import blank
from eecompile.kernels.clock import tick
from eecompile.kernels.combine import ensemble, keep_best, weighted_ensemble
from eecompile.kernels.confidence import confidence
from eecompile.kernels.decide import decide
from eecompile.kernels.gate import gate
from eecompile.kernels.gather import gather, scatter
from eecompile.kernels.halt import halt
from eecompile.kernels.head_confidence import head_confidence
from eecompile.kernels.open_rows import open_rows
from eecompile.kernels.route import route
from eecompile.kernels.select import select
from eecompile.kernels.skip import pool_gate, skip

__all__ = [
    "blank",
    "confidence",
    "decide",
    "ensemble",
    "gate",
    "gather",
    "halt",
    "head_confidence",
    "keep_best",
    "open_rows",
    "pool_gate",
    "route",
    "scatter",
    "select",
    "skip",
    "tick",
    "weighted_ensemble",
]
