"""ONNX: conditions become `If`, each weight is there once, and settings are inputs with defaults."""

from __future__ import annotations

from pathlib import Path

import torch

from eecompile.export.description import KEY, Description
from eecompile.ir.settings import BUFFERS, Settings
from eecompile.onnx import convert
from eecompile.passes.lower_cond import lower_cond
from eecompile.program import Program


def write(program: Program, settings: Settings, description: Description, path: Path) -> None:
    """Writes `path`, and `path` with `.data` after it where the weights do not fit into one file.

    Raises:
        ExportError: The exporter knows no ONNX form of an operator, or made a graph that the checker refuses.
    """
    exported = lower_cond(program, settings, settings_are_inputs=True)
    held = [name for name in BUFFERS if any(n.op == "placeholder" and n.name == name for n in exported.graph.nodes)]
    values = settings.tensors(torch.device("cpu"))
    convert(
        exported,
        path,
        description.inputs,
        description.outputs,
        shapes=[leaf.shape for leaf in program.signature.inputs],
        defaults={name: values[name] for name in held},
        metadata={KEY: description.to_json()},
    )
