"""`fast.explain()`: everything that was found, inserted and refused, as data. How it is shown is in `inspect`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from rich.console import RenderableType
from rich.pretty import Pretty

from eecompile.passes import facts
from eecompile.program import Program
from eecompile.public_records import router_record
from eecompile.training.report import Report, json_safe

if TYPE_CHECKING:
    from eecompile.module import CompiledModule


@dataclass
class Explanation(Report):
    """What `explain` found; `fast` is the module that it speaks of."""

    title: ClassVar[str] = "program"
    renderer: ClassVar[Callable[[Explanation], RenderableType] | None] = None  # set by eecompile.inspect

    data: dict[str, Any]
    fast: CompiledModule = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        safe: dict[str, Any] = json_safe(self.data)
        return safe

    def __rich__(self) -> RenderableType:
        render = type(self).renderer
        return Pretty(self.data) if render is None else render(self)


def _routes(fast: CompiledModule) -> dict[str, Any] | None:
    """The router, its routes, and what `evaluate` saw of them last; None without one."""
    router = router_record(fast.program)
    if router is None:
        return None
    return {**vars(router), "routes": [vars(r) for r in fast.routes], "last_evaluated": fast.seen.routes or None}


def _guarantee(fast: CompiledModule) -> dict[str, Any] | None:
    """The promise of the last calibration, and why it is void; None without one."""
    if fast.guarantee is None:
        return None
    return {"text": fast.guarantee.text, "void": fast.guarantee.void(fast) or None}


def unknown_early(program: Program) -> list[tuple[int, str]]:
    """Output leaves without a value (NaN, or 0) in rows that left too early: index, and the first exit that has one."""
    assert program.marked is not None
    names = [*(e.name for e in program.exits), "model"]
    leaves = facts.own_leaves(program.marked, program.signature)
    blanked = [(i, n.args[2]) for i, n in enumerate(leaves) if n.target is torch.ops.eecompile.blank.default]
    return [(i, names[int(known)]) for i, known in blanked]  # type: ignore[arg-type]


def explain(fast: CompiledModule) -> Explanation:
    """Collects what is known about a compiled module."""
    program = fast.program
    costs = fast.costs([e.is_open for e in fast.exits]).tolist()
    return Explanation(
        {
            "model": fast.title,
            "strategy": fast.strategy.to_dict(),
            "front_end": program.capture.front_end,
            "capture": list(fast.notes),
            "executor": fast.executor,
            "executor_reason": fast.executor_reason,
            "backend": fast.backend,
            "flops_per_row": program.total_flops,
            "inputs": [leaf.describe() for leaf in program.signature.inputs],
            "outputs": [leaf.describe() for leaf in program.signature.outputs],
            "unknown_early": [
                {"output": program.signature.outputs[i].path, "known_from": known} for i, known in unknown_early(program)
            ],
            "prediction": program.prediction_leaf.path,
            "blocks": [
                {"name": b.name, "kind": b.kind, "share": program.share(b.flops), "output": b.output}
                for b in program.structure.blocks
            ],
            "exits": [
                {
                    "name": e.name,
                    "after": e.cut,
                    "node": e.node,
                    "depth": e.depth,
                    "threshold": e.threshold,
                    "temperature": e.temperature,
                    "open": e.is_open,
                    "trained": e.trained,
                    "head": e.head_kind,
                    "head_cost": e.head_cost,
                    "cost": costs[i],
                    "criterion": e.criterion.to_dict(),
                }
                for i, e in enumerate(fast.exits)
            ],
            "gates": [
                {
                    "name": g.name,
                    "region": g.region,
                    "kind": g.kind,
                    "node": g.node,
                    "unit": g.head_kind,
                    "unit_cost": g.head_cost,
                    "threshold": g.threshold,
                    "trained": g.trained,
                    "saves": g.saves,
                    "depth": g.depth,
                }
                for g in fast.gates
            ],
            "widths": [vars(w) for w in fast.widths],
            "halts": [asdict(h) for h in fast.halts],
            "untrained": list(fast.untrained),
            "guarantee": _guarantee(fast),
            "mean_steps": fast.seen.steps,
            "routes": _routes(fast),
            "cuts": [
                {
                    "name": c.name,
                    "value": c.value,
                    "depth": c.depth,
                    "block": c.is_block,
                    "dominates": c.dominates,
                    "live": [
                        {"node": v.node, "shape": list(v.shape), "dtype": v.dtype, "batch_axis": v.batch_axis}
                        for v in c.live
                    ],
                }
                for c in program.structure.cuts
            ],
            "stages": [
                {
                    "name": s.name,
                    "exit": s.exit,
                    "share": program.share(s.flops),
                    "nodes": s.nodes,
                    "live_in": [v.node for v in s.inputs],
                    "live_out": [v.node for v in s.outputs],
                }
                for s in program.stages
            ],
            "refusals": [{"node": r.node, "rule": r.rule, "reason": r.reason} for r in program.refusals],
            "passes": [
                {"name": s.name, "seconds": s.seconds, "nodes": s.nodes_after, "summary": s.summary} for s in program.history
            ],
        },
        fast,
    )
