"""Sums of strategies for the tests."""

from __future__ import annotations

from collections.abc import Callable

from eecompile import strategies
from eecompile.strategies import Strategy

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
