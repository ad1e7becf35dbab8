"""Sums of strategies, and routers, for the tests."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from eecompile import CompiledModule, strategies
from eecompile.strategies import Branchy, Router, Strategy

EXITS = {"exits": 2, "criterion": "max_probability"}
SUMS: dict[str, Callable[[], Strategy]] = {
    "branchy + skipnet": lambda: strategies.Branchy(**EXITS) + strategies.SkipNet(open_bias=0.0),
    "mebert + skipnet on halves": lambda: strategies.MeBert(head="auto") + strategies.SkipNet("halves", open_bias=0.0),
    "anytime + recurrent skipnet": lambda: strategies.Anytime() + strategies.SkipNet(unit="recurrent", open_bias=0.0),
    "ann + skipnet": lambda: strategies.Ann(gradient_equilibrium=True) + strategies.SkipNet(open_bias=0.0),
    "patient branchy + depth_adaptive gates": lambda: (
        strategies.Branchy(exits=2, criterion="patience") + strategies.DepthAdaptive(mode="gates", open_bias=0.0)
    ),
    "anytime ensemble + depth up front": lambda: (
        strategies.Anytime(combine="ensemble") + strategies.DepthAdaptive(targets="cost", open_bias=0.0)
    ),
    "ann + self_adaptive": lambda: strategies.Ann() + strategies.SelfAdaptive(exits=None, open_bias=0.0),
    "branchy + act": lambda: strategies.Branchy(**EXITS) + strategies.Act(halting_bias=0.0),
    "anytime + act": lambda: strategies.Anytime() + strategies.Act(halting_bias=-0.5),
}

SEQUENCES: dict[str, Callable[[], Strategy]] = {  # for models with positions, or one chain of blocks
    "branchy + act per position": lambda: strategies.Branchy(**EXITS) + strategies.Act(per_token=True, halting_bias=0.0),
    "branchy + pondernet": lambda: strategies.Branchy(**EXITS) + strategies.Act(halting="pondernet", halting_bias=0.0),
}

WIDTHS: dict[str, Callable[[], Strategy]] = {
    "widths": lambda: strategies.SelfAdaptive(exits=None, widths=(0.25, 0.5, 0.75, 1.0), open_bias=0.0),
    "widths and exits": lambda: strategies.SelfAdaptive(exits=2, widths=(0.25, 0.5, 0.75, 1.0), open_bias=0.0),
}


class Squash(nn.Module):
    """A branch of the user's that hands on what it is given, a little changed."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.9))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x * self.scale)


def sent(kind: str, base: CompiledModule) -> Branchy:
    """A router at the first cut of the model, to exits, to a lighter branch, to several branches after an exit."""
    names = [c.name for c in base.program.structure.cuts if c.is_block]
    if kind == "router to exits":
        return Branchy(exits=names[1:3], router=Router(at=names[0], to="exits", unit="linear"), max_head_share=1e9)
    if kind == "router to a lighter branch":
        return Branchy(router=Router(at=names[0], to={"light": 0.5}, unit="linear"))
    to = {"light": 0.5, "squash": Squash(), "none": 0.01} if len(names) < 5 else {"light": 0.5, "none": 0.01}
    router = Router(at=names[0], to=to, over=(names[1], names[-1]), unit="linear")
    return Branchy(exits=names[:1], router=router, max_head_share=1e9)


ROUTERS = ("router to exits", "router to a lighter branch", "router to several branches")


def composed(kind: str, base: CompiledModule) -> Strategy:
    """What goes into the model that `base` was compiled from."""
    return sent(kind, base) if kind in ROUTERS else {**SUMS, **SEQUENCES, **WIDTHS}[kind]()
