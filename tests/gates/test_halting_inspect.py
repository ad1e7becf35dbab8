"""Halting as people see it: explain, the tree, tables, why a row cost what it did, and the command line."""

from __future__ import annotations

import json

import pytest

from eecompile import strategies
from eecompile.inspect import to_text, where
from eecompile.inspect.outline import outline
from tests.cli.shell import call, found
from tests.gates.adaptive import rows, tower
from tests.support import compiled as eecompile


@pytest.fixture(scope="module")
def fast():
    x, _, _ = rows(6, seed=1)
    return eecompile(tower(4), strategies.Act(halting="pondernet", prior=0.4), example_inputs=(x,))


def test_explain_lists_chains_and_their_steps(fast):
    fast.set_halting_threshold(0.5)
    shown = fast.explain().to_dict()
    (chain,) = shown["halts"]
    assert (chain["rule"], chain["threshold"], chain["repeated"]) == ("stop", 0.5, False)
    assert [s["region"] for s in chain["steps"]] == [f"blocks.{i}" for i in range(4)]
    assert {s["unit"] for s in chain["steps"]} == {"linear"}
    assert sum(s["cost"] for s in chain["steps"]) < 1 and all(s["unit_cost"] > 0 for s in chain["steps"])
    text = str(fast)
    assert "act: 1 halting chain, " in text
    assert "rows halt once they have stopped with probability 0.5" in text
    assert "blocks.2: 24." in text and "a step, linear unit of" in text
    assert "halt_0_step_3" in to_text(fast, "table")
    x, labels, _ = rows(32, seed=2)
    assert shown["mean_steps"] is None
    measured = fast.evaluate([(x, labels)]).mean_steps
    assert fast.explain().to_dict()["mean_steps"] == measured
    assert f"{measured:.3g} of 4 steps on average" in str(fast) and f"{measured:.3g} of 4 steps" in to_text(fast, "table")
    fast.set_halting_threshold(2.0)
    assert "never halts, every step is taken" in str(fast) and "never halts" in to_text(fast, "table")


def test_blocks_keep_their_share_of_the_cost_and_no_more_is_listed(fast):
    regions = [r for _, _, r in outline(fast, collapse=False).regions()]
    assert [r.name for r in regions if r.kind] == [f"blocks.{i}" for i in range(4)]
    assert {r.name for r in regions if not r.kind} <= {"embed", "norm, classifier"}, "nodes that halting added are listed"


def test_why_a_row_cost_what_it_did(fast):
    fast.set_halting_threshold(0.5)
    x, _, _ = rows(5, seed=3)
    shown = where(fast, x)
    steps = fast.run(x).steps.tolist()
    assert [r.steps for r in shown.rows] == steps
    assert shown.rows[0].why == f"it took {steps[0]} step{'' if steps[0] == 1 else 's'}"
    assert "steps on average" in str(shown)
    json.dumps(shown.to_dict())


@pytest.mark.nightly
def test_the_command_line(tmp_path):
    net = tmp_path / "net.py"
    net.write_text(
        "import torch\nfrom eecompile.cli.digits_net import DigitsNet\n"
        "def build():\n    torch.manual_seed(0)\n    return DigitsNet(4).eval()\n"
    )
    place = str(tmp_path / "program")
    options = [a for o in ("halting=pondernet", "prior=0.4", 'blocks=["blocks.1", "blocks.2"]') for a in ("--option", o)]
    made = found("rewrite", f"{net}:build", "--input", "x=float32[4,1,8,8]", "--strategy", "act", *options, "-o", place)
    assert [s["region"] for s in made["halts"][0]["steps"]] == ["blocks.1", "blocks.2"]
    fitted = found("fit", place, "--data", "digits:val", "--epochs", "1", "--heads-only")
    assert fitted["rows"][0]["halts"]["divergence"] >= 0
    calibrated = found("calibrate", place, "--data", "digits:val", "--max-drop", "0.5", "--no-guarantee")
    assert calibrated["halting"][0]["most"] == 2
    evaluated = found("evaluate", place, "--data", "digits:val", "--curve", "3")
    assert 1 <= evaluated["mean_steps"] <= 2 and [p["threshold"] for p in evaluated["curve"]] == [0.5, 1.0]
    ran = found("run", place, "--data", "digits:test", "--rows", "3")
    assert all(1 <= row["steps"] <= 2 for row in ran["rows"])
    shown = call("inspect", place).stdout
    assert "1 halting chain" in shown
