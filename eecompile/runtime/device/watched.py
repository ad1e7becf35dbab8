"""Runs a module node by node under fake tensors, which have no values: an operator that asks for one is found there."""

from __future__ import annotations

from typing import Any

from torch import fx
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from eecompile.errors import UnsupportedModelError
from eecompile.passes import facts

NEEDS_HOST = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
    GuardOnDataDependentSymNode,
)


class HostValueError(UnsupportedModelError):
    """A node needs a value of a tensor on the host.

    Attributes:
        node: Its name.
        reason: What it asks for.
        source: Line of the model's code, empty where unknown.
    """

    def __init__(self, node: fx.Node, error: BaseException) -> None:
        self.node, self.source = node.name, source_of(node)
        text = str(error).splitlines()
        what = facts.target_name(node) or node.target
        self.reason = f"{what} needs a value on the host: {text[0] if text else type(error).__name__}"
        super().__init__(
            "this model cannot run on the device alone",
            where=f"{node.name}, {self.source}" if self.source else node.name,
            got=self.reason,
            wanted="operators whose work does not depend on values, only on shapes",
            hint='set fast.executor = "compact"; fast.check_no_sync() lists every such operator',
        )


class Watched(fx.Interpreter):
    """Runs a module, and says at which node a value was asked for.

    Raises:
        HostValueError: At that node.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=True)

    def run_node(self, n: fx.Node) -> Any:
        try:
            return super().run_node(n)
        except NEEDS_HOST as error:
            raise HostValueError(n, error) from error


def source_of(node: fx.Node) -> str:
    """File and line of the model's code that made a node; empty where unknown."""
    trace = node.meta.get("stack_trace") or ""
    lines = [line.strip() for line in str(trace).splitlines() if line.strip().startswith("File ")]
    return lines[-1].removeprefix("File ") if lines else ""
