"""An exported program as native code of AOTInductor, for the processor of this machine: run from Python or from C++."""

from __future__ import annotations

import contextlib
import io
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from eecompile.errors import ExportError
from eecompile.export.description import KEY, Description
from eecompile.export.runtimes import opened
from eecompile.export.targets import archive
from eecompile.export.verify import compared
from eecompile.ir.settings import Settings
from eecompile.passes.lower_cond import example_of, lower_cond
from eecompile.program import Program

SIZES = (1, 2, 37)
"""Batch sizes at which the compiled code is compared with the reference before it is given out."""


def write(program: Program, settings: Settings, description: Description, path: Path) -> None:
    """Compiles the program, compares the code with the reference executor on random inputs, and writes the package.

    Raises:
        ExportError: There is no C++ compiler, it cannot compile the program, or the code gives other outputs.
    """
    # A program that was saved and loaded compiles; one that is still in memory leaves sizes of branches unbound.
    loaded = torch.export.load(io.BytesIO(archive(lower_cond(program, settings), description)))
    options = {
        "aot_inductor.metadata": {KEY: description.to_json()},
        # settings that were folded into the code could not be set later
        "joint_graph_constant_folding": False,
        "always_keep_tensor_constants": True,
        "layout_optimization": False,  # torch 2.13: with it, a convolution after a condition reads other strides than it has
    }
    try:
        with warnings.catch_warnings():  # of the compiler about itself
            warnings.simplefilter("ignore")
            with _any_batch():
                torch._inductor.aoti_compile_and_package(loaded, package_path=str(path), inductor_configs=options)
    except OSError:
        raise
    except Exception as error:  # the compiler raises many unrelated types
        raise ExportError(
            "AOTInductor could not compile the program",
            got=f"{type(error).__name__}: {' '.join(str(error).split())[:400]}",
            hint='a C++ compiler must be there (g++ or clang++); target="pt2" needs none',
        ) from error
    if not zipfile.is_zipfile(path):
        raise ExportError("AOTInductor wrote no package", where=str(path), hint='target="pt2" needs no compiler')
    low, high = program.signature.dynamic["batch"]
    sizes = [n for n in SIZES if n >= low and (high is None or n <= high)] or [low]
    problems = compared(program, settings, opened(path), [_inputs(program, n) for n in sizes])
    if problems:
        raise ExportError(
            "the code that AOTInductor made of the program is not the program",
            got=problems[0],
            hint='target="pt2" or "onnx" is right; nothing was written',
        )


@contextlib.contextmanager
def _any_batch() -> Iterator[None]:
    """Without oneDNN and NNPACK, whose choice asks for the batch size, and would fix it to less than 16, or to more.

    The compiled code calls them all the same.
    """
    with torch.backends.mkldnn.flags(enabled=False), torch.backends.nnpack.flags(enabled=False):
        yield


def _inputs(program: Program, rows: int) -> list[Tensor]:
    """Random inputs; integers are 0 or 1, which every table has, and masks are open."""
    random = torch.Generator().manual_seed(rows)
    found = []
    for leaf, example in zip(program.signature.inputs, example_of(program, program.signature.dynamic), strict=True):
        shape = [rows if i == leaf.batch_axis else n for i, n in enumerate(example.shape)]
        if leaf.dtype.is_floating_point:
            made = torch.randn(shape, generator=random).to(leaf.dtype)
        elif leaf.dtype == torch.bool:
            made = torch.ones(shape, dtype=leaf.dtype)
        else:
            made = torch.randint(0, 2, shape, generator=random, dtype=leaf.dtype)
        found.append(made.to(example.device))
    return found
