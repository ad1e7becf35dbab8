"""The vocabulary: importing this module registers `torch.ops.eecompile.*`.

The names below are the plain torch definitions. They copy nothing that they need not copy, and executors
call them directly; in graphs stand the operators of the same names, each with a fake implementation and a
gradient.
"""

from eecompile.kernels.blank import blank
from eecompile.kernels.confidence import confidence
from eecompile.kernels.halt import halt
from eecompile.kernels.route import route
from eecompile.kernels.select import select
from eecompile.kernels.skip import skip

__all__ = ["blank", "confidence", "halt", "route", "select", "skip"]
