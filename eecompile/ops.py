"""The vocabulary: importing this module registers `torch.ops.eecompile.*`.

In graphs stand the operators, each with a fake implementation and a gradient; they run as Triton kernels where they have
one and it can run. The names below are the plain torch definitions, which copy nothing that they need not copy, and which
executors call directly; `confidence` and `halt` are their kernels where those can run.

`decide`, `tick`, `gather`, `scatter` and `open_rows` are what executors are made of: they write into buffers and have no
gradient; nor has `head_confidence`, with which a draft head proposes tokens.
"""

from eecompile.kernels.blank import blank
from eecompile.kernels.choose import choose
from eecompile.kernels.clock import tick
from eecompile.kernels.combine import ensemble, keep_best, weighted_ensemble
from eecompile.kernels.confidence import run_confidence as confidence
from eecompile.kernels.decide import decide
from eecompile.kernels.gate import gate
from eecompile.kernels.gather import gather, scatter
from eecompile.kernels.halt import run_halt as halt
from eecompile.kernels.head_confidence import head_confidence
from eecompile.kernels.open_rows import open_rows
from eecompile.kernels.packed_rnn import packed_rnn
from eecompile.kernels.select import select

__all__ = [
    "blank",
    "choose",
    "confidence",
    "decide",
    "ensemble",
    "gate",
    "gather",
    "halt",
    "head_confidence",
    "keep_best",
    "open_rows",
    "packed_rnn",
    "scatter",
    "select",
    "tick",
    "weighted_ensemble",
]
