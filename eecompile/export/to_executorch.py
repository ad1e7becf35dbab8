"""An exported program as a `.pte` file of ExecuTorch.

Its kernels have no sizes that depend on data, so the program takes one row: each condition asks whether that row goes on,
and nothing is gathered. Sizes other than the batch need an upper bound, since memory is planned ahead.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from eecompile.errors import ExportError
from eecompile.export.description import KEY, Description
from eecompile.ir.settings import Settings
from eecompile.passes.lower_cond import lower_cond
from eecompile.program import Program
from eecompile.translating import translating


def write(program: Program, settings: Settings, description: Description, path: Path) -> None:
    """Writes the program for one row, its settings fixed.

    Raises:
        ExportError: A size without an upper bound, or an operator that ExecuTorch has no kernel for.
    """
    from executorch.exir import to_edge

    free = [n for n, (low, high) in program.signature.dynamic.items() if n != "batch" and high is None and low != high]
    if free:
        raise ExportError(
            "ExecuTorch plans memory ahead, and a size of this program has no upper bound",
            got=", ".join(free),
            wanted="a model whose sizes are fixed or bounded, such as by its table of positions",
            hint='target="pt2" or "onnx" has them free',
        )
    exported = lower_cond(program, settings, single=True)
    signature = program.signature
    axes = [leaf.batch_axis for leaf in signature.inputs], [leaf.batch_axis for leaf in signature.outputs]
    text = replace(description, batch_axes=axes).to_json()
    with translating("ExecuTorch could not translate the program"):
        made = to_edge(exported, constant_methods={KEY: text}).to_executorch()
    path.write_bytes(made.buffer)
