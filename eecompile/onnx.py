"""ONNX files from exported programs, and ONNX Runtime's sessions for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from eecompile.errors import ExportError
from eecompile.translating import translating

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
"""What the extra "onnx" brings."""
OPSET, IR = 20, 9
"""What the files need of a runtime; the oldest ONNX Runtime with both is 1.17."""
EXTERNAL = 1_900_000_000
"""Bytes of weights from which they go to a file of their own: one file holds less than 2 GB."""


def convert(
    exported: ExportedProgram,
    path: Path,
    inputs: Sequence[str],
    outputs: Sequence[str],
    shapes: Sequence[Sequence[int | str]] = (),
    defaults: Mapping[str, Tensor] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """An exported program as an ONNX file.

    Args:
        inputs: Their names, in order; so `outputs`.
        shapes: Of the inputs; a string names a dynamic size.
        defaults: Of further inputs, after these.
        metadata: What the file says of itself.

    Raises:
        ExportError: The exporter knows no ONNX form of an operator, or made a graph that the checker refuses.
    """
    import onnx
    import onnx_ir

    defaults = defaults or {}
    with translating("torch.onnx could not translate the program"):
        made: Any = torch.onnx.export(
            exported,
            dynamo=True,
            verbose=False,
            opset_version=OPSET,
            input_names=[*inputs, *defaults],
            output_names=list(outputs),
        )
    model = made.model
    _name_sizes(model, shapes)
    for given in model.graph.inputs:
        if given.name in defaults:
            given.const_value = onnx_ir.tensor(defaults[given.name].numpy(), name=given.name)
            model.graph.register_initializer(given)
    model.metadata_props.update(metadata or {})
    model.producer_name, model.ir_version = "eecompile", IR
    size = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    _weights_where_read(model)
    onnx_ir.save(model, path, external_data=f"{path.name}.data" if size > EXTERNAL else None)
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except onnx.checker.ValidationError as error:
        raise ExportError("the ONNX checker refuses the graph that torch.onnx made", got=str(error)[:600]) from error


def _name_sizes(model: Any, shapes: Sequence[Sequence[int | str]]) -> None:
    """Names dynamic sizes as the signature does, and drops the exporter's notes on each node: they outweigh small models."""
    import onnx_ir

    names: dict[str, str] = {}
    for given, shape in zip(model.graph.inputs, shapes, strict=False):
        for size, name in zip(given.shape, shape, strict=True):
            if isinstance(name, str) and isinstance(size, onnx_ir.SymbolicDim) and size.value is not None:
                names[size.value] = name
    graphs = {model.graph}
    for node in onnx_ir.traversal.RecursiveGraphIterator(model.graph):
        node.metadata_props.clear()
        node.doc_string = None
        if node.graph is not None:
            graphs.add(node.graph)
        for value in node.outputs:
            _rename(value, names)
    for graph in graphs:
        graph.metadata_props.clear()
        for value in (*graph.inputs, *graph.initializers.values()):
            _rename(value, names)


def _weights_where_read(model: Any) -> None:
    """Moves each weight into the innermost branch of an `If` that holds all of its readers.

    ONNX Runtime folds and lays out a convolution only with weights of its own graph: in a branch that reads those of the
    outer one it runs as it is written.
    """
    import onnx_ir

    above: dict[Any, Any] = {}  # the graph around each branch
    for node in onnx_ir.traversal.RecursiveGraphIterator(model.graph):
        above |= {a.value: node.graph for a in node.attributes.values() if a.type == onnx_ir.AttributeType.GRAPH}

    def around(graph: Any) -> list[Any]:
        return [*(around(above[graph]) if graph in above else []), graph]

    for value in list(model.graph.initializers.values()):
        if value.is_graph_input() or value.is_graph_output():
            continue
        common = [
            graphs[0]
            for graphs in zip(*(around(node.graph) for node, _ in value.uses()), strict=False)
            if len(set(graphs)) == 1
        ]
        if len(common) > 1:
            del model.graph.initializers[value.name]
            common[-1].register_initializer(value)


def _rename(value: Any, names: dict[str, str]) -> None:
    value.metadata_props.clear()
    value.doc_string = None
    for axis, size in enumerate(value.shape or ()):
        text = getattr(size, "value", None)
        if text in names:
            value.shape[axis] = names[text]


def session(path: Path) -> Any:
    """A file in ONNX Runtime on the CPU, quiet, with as many threads as torch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
