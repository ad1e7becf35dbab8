"""Gradient equilibrium in a training graph: no exit's gradient grows with the number of exits (Li et al. 2019).

At exit i of N classifiers (the model's own end is the last) the gradient that comes from the head is multiplied by
1 / (N - i), that from the rest of the trunk by (N - i - 1) / (N - i), i from 0. Each is the identity in the forward pass.
Without it the early layers add up the gradients of all exits after them, and their variance grows with the depth.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from eecompile.kernels.scale_gradient import scale_gradient
from eecompile.passes import facts
from eecompile.passes.base import Pass, PassResult
from eecompile.passes.stage import Layout
from eecompile.program import Program


@dataclass(frozen=True)
class Equilibrium(Pass):
    """Scales gradients at the exits of a marked training graph."""

    name: ClassVar[str] = "equilibrium"
    requires: ClassVar[frozenset[str]] = frozenset({"marked"})
    ensures: ClassVar[frozenset[str]] = frozenset({"gradients in equilibrium"})

    def run(self, program: Program) -> PassResult:
        gm = facts.copy(program.graph_module)
        copied = program.replace(graph_module=gm, marked=gm)
        layout = Layout(copied)
        position: dict[fx.Node, float] = {n: float(i) for i, n in enumerate(gm.graph.nodes)}
        present: dict[fx.Node, fx.Node] = {}  # a live value as it was scaled last
        count = 0
        for i, e in enumerate(program.exits):
            left = len(program.exits) + 1 - i
            head = next(n for n in gm.graph.nodes if n.op == "call_module" and n.target == e.head)
            first = head.args[0]
            assert isinstance(first, fx.Node)
            with gm.graph.inserting_before(head):
                head.update_arg(0, _scaled(gm, first, 1 / left, position, position[head], i))
            after = layout.trunk[layout.bounds[i] + 1]
            for n in layout.live(i):
                if n not in layout.learned or not facts.value(n).is_floating_point():
                    continue
                now = present.get(n, n)
                with gm.graph.inserting_before(after):
                    new = _scaled(gm, now, (left - 1) / left, position, position[after], i)
                at = position[after]
                now.replace_all_uses_with(
                    new,
                    delete_user_cb=lambda u, at=at, new=new: u is not new and position.get(u, -1.0) >= at,  # type: ignore[misc]
                )
                present[n] = new
                count += 1
        facts.tidy(gm)
        return PassResult(copied, True, summary=f"{count} values scaled at {len(program.exits)} exits")


def _scaled(gm: fx.GraphModule, n: fx.Node, factor: float, position: dict[fx.Node, float], at: float, mark: int) -> fx.Node:
    new: Any = gm.graph.call_function(scale_gradient, (n, factor))
    new.meta = {"eecompile": mark, **{k: v for k, v in n.meta.items() if k == "val"}}
    position[new] = at - 0.5
    return new  # type: ignore[no-any-return]
