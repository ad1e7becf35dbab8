"""A router from the command line: an option of the strategy, trained, run and shown like everything else."""

from __future__ import annotations

from pathlib import Path

from tests.cli.shell import call, found

# blocks.1 to blocks.4 without every other block, for the rows that a router after blocks.0 picks
ROUTER = '{"at": "blocks.0", "to": {"light": 0.5}, "unit": "linear", "warm_up": 0.5}'


def test_a_light_version(model: str, tmp_path: Path) -> None:
    out = str(tmp_path / "routed")
    made = found("rewrite", model, "--input", "x=float32[4,1,8,8]", "--option", f"router={ROUTER}", "-o", out)
    assert made["exits"] == []
    assert [r["name"] for r in made["routes"]["routes"]] == ["light", "full"]
    assert made["routes"]["routes"][0]["left_out"] == ["blocks.2", "blocks.4"]
    trained = found("fit", out, "--data", "digits", "--epochs", "2")
    assert [row["stage"] for row in trained["rows"]] == ["every branch", "routed"]
    assert trained["routes"] == ["light", "full"]
    ran = found("run", out, "--data", "digits:test", "--rows", "3")
    assert {row["route"] for row in ran["rows"]} <= {"light", "full"}
    assert all(row["why"] == f"the router sent it to {row['route']}" for row in ran["rows"])
    evaluated = found("evaluate", out, "--data", "digits:test")
    assert [r["name"] for r in evaluated["routes"]] == ["light", "full"]
    calibrated = found("calibrate", out, "--data", "digits:val", "--max-drop", "0.5", "--no-guarantee")
    assert [r["name"] for r in calibrated["routes"]] == ["light", "full"]
    shown = call("inspect", out).stdout
    assert "router at blocks.0" in shown
    assert "routes" in call("inspect", out, "--format", "table").stdout


def test_straight_to_exits(model: str, tmp_path: Path) -> None:
    out = str(tmp_path / "sent")
    option = 'router={"at": "blocks.0", "unit": "linear"}'
    found("rewrite", model, "--input", "x=float32[4,1,8,8]", "--exits", "blocks.2", "--option", option, "-o", out)
    ran = found("run", out, "--data", "digits:test", "--rows", "3")
    assert {row["route"] for row in ran["rows"]} <= {"exit_0", "model"}
    calibrated = found("calibrate", out, "--data", "digits:val", "--max-drop", "0.5", "--no-guarantee")
    assert calibrated["qualified"]
