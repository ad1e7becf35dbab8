"""Makes a segment quick to call: where attributes stand is looked up once, operators are called through torch's fast parser.

An FX module looks every parameter up by its dotted path at every call, and an `OpOverload` parses its schema in the
dispatcher's slow path. On a LeNet at batch 1 that is a tenth of the time. Without gradients, operators write over operands
that nothing needs again (`runtime/reuse.py`). Numbers do not change: the same kernels run. Under autocast an operator may
give another dtype than when it was captured, so nothing is written over there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from eecompile.capture.tensors import entry
from eecompile.errors import MissingDependencyError
from eecompile.passes import facts
from eecompile.passes.live_positions import LivePositions
from eecompile.passes.partition import Partition
from eecompile.runtime.precision import any_autocast
from eecompile.runtime.reuse import overwriting, reusable

aten = torch.ops.aten
# The same dispatcher entries by their Python bindings; positional signatures agree.
QUICK: dict[Any, Callable[..., Any]] = {
    aten.linear.default: torch._C._nn.linear,
    aten.conv1d.default: torch.conv1d,
    aten.conv2d.default: torch.conv2d,
    aten.relu.default: torch.relu,
    aten.relu_.default: torch.relu_,
    aten.tanh.default: torch.tanh,
    aten.tanh_.default: torch.tanh_,
    aten.sigmoid.default: torch.sigmoid,
    aten.sigmoid_.default: torch.sigmoid_,
    aten.max_pool2d.default: torch.max_pool2d,
    aten.avg_pool2d.default: torch._C._nn.avg_pool2d,
    aten.adaptive_avg_pool2d.default: torch._C._nn.adaptive_avg_pool2d,
    aten.batch_norm.default: torch.batch_norm,
    aten.layer_norm.default: torch.layer_norm,
    aten.embedding.default: torch.embedding,
    aten.add.Tensor: torch.add,
    aten.add_.Tensor: Tensor.add_,
    aten.mul.Tensor: torch.mul,
    aten.mul_.Tensor: Tensor.mul_,
    aten.sub_.Tensor: Tensor.sub_,
    aten.div_.Tensor: Tensor.div_,
    aten.matmul.default: torch.matmul,
    aten.transpose.int: torch.transpose,
    aten.permute.default: torch.permute,
    aten.reshape.default: torch.reshape,
    aten.flatten.using_ints: torch.flatten,
    aten.view.default: Tensor.view,
    aten.contiguous.default: Tensor.contiguous,
    aten.sym_size.int: Tensor.size,
    aten.scaled_dot_product_attention.default: torch._C._nn.scaled_dot_product_attention,
    aten.gelu.default: torch._C._nn.gelu,
    aten.gelu_.default: torch._C._nn.gelu_,  # type: ignore[attr-defined]
    aten.dropout.default: torch.dropout,
}
# Those whose keywords the Python binding knows too.
KEYWORDS = (
    aten.add.Tensor,
    aten.add_.Tensor,
    aten.sub_.Tensor,
    aten.scaled_dot_product_attention.default,
    aten.gelu.default,
    aten.gelu_.default,
)


Entry = tuple[dict[str, Any], str]


def lifted(module: fx.GraphModule, reuse: bool = False) -> tuple[fx.GraphModule, tuple[Entry, ...]]:
    """The module with its attributes as leading inputs, and where these stand.

    Args:
        reuse: Whether operators and gated regions may write over values that are not needed again; only right without
            gradients, and outside of autocast.
    """
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    values: dict[str, tuple[fx.Node, Entry]] = {}
    for n in module.graph.nodes:  # inputs keep their order after the attributes
        if n.op == "get_attr" and str(n.target) not in values:
            value = facts.attribute(module, str(n.target))
            if isinstance(value, Tensor):
                values[str(n.target)] = (graph.placeholder(f"attr_{len(values)}"), entry(module, str(n.target)))
    in_place = reusable(module) if reuse else {}
    over = overwriting(module) if reuse else set()
    for n in module.graph.nodes:
        if n.op == "get_attr" and str(n.target) in values:
            env[n] = values[str(n.target)][0]
            continue
        new = env[n] = graph.node_copy(n, lambda a: env[a])
        if n in in_place:
            new.target, args = in_place[n]
            new.args = fx.node.map_arg(args, lambda a: env[a])
        if n in over:
            new.kwargs = {"over": True}
        quick = QUICK.get(new.target) if n.op == "call_function" else None
        if quick is not None and (not n.kwargs or new.target in KEYWORDS):
            new.target = quick
    result = fx.GraphModule(module, graph, class_name=module.__class__.__name__)
    return result, tuple(v for _, v in values.values())


class EagerSegment:
    """Calls a segment's generated code without module hooks and attribute look-ups."""

    def __init__(self, module: fx.GraphModule) -> None:
        for region in module.modules():
            if isinstance(region, LivePositions):
                region.call = EagerSegment(region.body)
            elif isinstance(region, Partition):
                region.prepare(EagerSegment)
        self.source = module
        self.module, self.entries = lifted(module, reuse=True)
        self.forward = self.module.forward
        self._plain: Callable[..., tuple[Tensor, ...]] | None = None

    def __call__(self, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        forward = self.plain() if torch.is_grad_enabled() or any_autocast() else self.forward
        result: tuple[Tensor, ...] = forward(*[entries[name] for entries, name in self.entries], *inputs)
        return result

    def forward_only(self) -> Callable[..., tuple[Tensor, ...]]:
        """The segment without gradients: operators write over operands whatever the mode is."""
        forward = self.forward

        def call(*inputs: Tensor | None) -> tuple[Tensor, ...]:
            given: tuple[Tensor, ...] = forward(*[entries[name] for entries, name in self.entries], *inputs)
            return given

        return call

    def plain(self) -> Callable[..., tuple[Tensor, ...]]:
        """The code that leaves every operand as it was, built when gradients or autocast first need it."""
        if self._plain is None:
            self._plain = lifted(self.source)[0].forward
        return self._plain


def compiled(module: fx.GraphModule) -> Callable[..., tuple[Tensor, ...]]:
    """A segment through `torch.compile` with a dynamic batch: one graph for every number of survivors above one."""
    if not hasattr(torch, "compile"):
        raise MissingDependencyError("this torch has no torch.compile", hint='use backend="eager"')
    regions = [m for m in module.modules() if isinstance(m, Partition | LivePositions)]
    for region in regions:  # how many rows an arm has is known on the host only: the graph breaks around a region
        if isinstance(region, Partition):
            region.prepare(_compiled_body)
        else:
            region.call = _compiled_body(region.body)
        region.forward = torch.compiler.disable(region.forward)  # type: ignore[method-assign, no-untyped-call]
    call: Callable[..., tuple[Tensor, ...]] = torch.compile(module, dynamic=True, fullgraph=not regions)
    return call


def _compiled_body(body: fx.GraphModule) -> Callable[..., tuple[Tensor, ...]]:
    whole = not any(isinstance(m, Partition | LivePositions) for m in body.modules())
    found: Callable[..., tuple[Tensor, ...]] = torch.compile(body, dynamic=True, fullgraph=whole)
    return found
