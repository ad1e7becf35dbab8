"""Gates and widths as choices: the arms that are possible under some settings lie between those that some scores lead to."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace

import pytest

from eecompile.ir import settings
from eecompile.ir.choices import ChoiceRecords
from eecompile.ir.records import Carry, Gate, Width
from eecompile.passes.regions import decisions, possible

CLOSED, BY_SCORE, OPEN = 2.0, 0.5, 0.0


def gates(*needs: str) -> tuple[Gate, ...]:
    carries, anchors = (Carry("y", "x", "node", 0),), (None, None)
    made = [(f"gate_{i}", n) for i, n in enumerate(needs)]
    return tuple(Gate(g, g, g, "block", 0.0, "", f"{g}_score", g, 1.0, 0.0, carries, anchors, n) for g, n in made)


def width(*of: str, skips: bool) -> Width:
    return Width("width_0", "region", "x", (0.5, 1.0), (), skips, of, tuple(f"value_{k}" for k in range(2)))


PROGRAMS = {
    "each for itself": ChoiceRecords(gates("", "", "")),
    "each closes all later ones": ChoiceRecords(gates("", "gate_0", "gate_1")),
    "widths that may be skipped, after a gate": ChoiceRecords(
        gates("", "gate_0", "gate_1"), (width("gate_1", "gate_2", skips=True),)
    ),
    "widths that always run": ChoiceRecords(gates("", ""), (width("gate_1", skips=False),)),
}


@pytest.mark.parametrize("choices", PROGRAMS.values(), ids=PROGRAMS.keys())
def test_possible_arms_are_those_between_what_scores_lead_to(choices):
    names = [g.name for g in choices.gates]
    program = SimpleNamespace(choices=choices)
    for thresholds in product((CLOSED, BY_SCORE, OPEN), repeat=len(names)):
        taken = [set() for _ in choices]
        for scores in product((0.0, 1.0), repeat=len(names)):
            opened = {"": True}
            for g, score, threshold in zip(choices.gates, scores, thresholds, strict=True):
                opened[g.name] = score >= threshold and opened[g.needs]
            for arms, c in zip(taken, choices, strict=True):
                arms.add(sum(opened[name] for name in c.gates))
        found = possible(program, settings.Settings().add(settings.gates(names), thresholds))
        assert [set(arms) for arms in found] == [set(range(min(t), max(t) + 1)) for t in taken], thresholds
        assert set(decisions(program, found)) == set(names)
