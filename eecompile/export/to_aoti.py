"""An exported program as native code of AOTInductor, for the processor of this machine: run from Python or from C++."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path

import torch

from eecompile.export.description import KEY, Description
from eecompile.export.to_pt2 import archive
from eecompile.ir.settings import Settings
from eecompile.passes.lower_cond import lower_cond
from eecompile.program import Program
from eecompile.translating import translating


def write(program: Program, settings: Settings, description: Description, path: Path) -> None:
    """Compiles the program and writes the package.

    Raises:
        ExportError: There is no C++ compiler, or it cannot compile the program.
    """
    # A program that was saved and loaded compiles; one that is still in memory leaves sizes of branches unbound.
    loaded = torch.export.load(io.BytesIO(archive(lower_cond(program, settings), description)))
    options = {
        "aot_inductor.metadata": {KEY: description.to_json()},
        # settings that were folded into the code could not be set later
        "joint_graph_constant_folding": False,
        "always_keep_tensor_constants": True,
        "layout_optimization": False,  # in torch 2.13 it has given wrong outputs of convolutions
    }
    hint = 'a C++ compiler must be there (g++ or clang++); target="pt2" needs none'
    with translating("AOTInductor could not compile the program", hint), _any_batch():
        torch._inductor.aoti_compile_and_package(loaded, package_path=str(path), inductor_configs=options)


@contextlib.contextmanager
def _any_batch() -> Iterator[None]:
    """Without oneDNN and NNPACK, whose choice asks for the batch size, and would fix it to less than 16, or to more.

    The compiled code calls them all the same.
    """
    with torch.backends.mkldnn.flags(enabled=False), torch.backends.nnpack.flags(enabled=False):
        yield
