"""`run --stream/--deadline-ms/--budget`, `calibrate --budget`, `evaluate --budgets`, in this process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from eecompile import load
from eecompile.cli.app import app
from tests.cli.test_cli import MODEL
from tests.support import opened


def call(*args: str, code: int = 0) -> Result:
    done = CliRunner().invoke(app, list(args))
    assert done.exit_code == code, (done.exit_code, done.output[-2000:], done.exception)
    return done


def found(*args: str):
    return json.loads(call(*args, "--json").stdout)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("anytime")
    (folder / "net.py").write_text(MODEL)
    out = str(folder / "program")
    made = found(
        "rewrite", f"{folder}/net.py:build", "--strategy", "anytime", "--option", "combine=ensemble",
        "--input", "x=float32[4,1,8,8]", "-o", out,
    )  # fmt: skip
    assert len(made["exits"]) >= 3
    opened(load(out)).save(out)
    return out


def test_a_stream_shows_every_answer(saved: str) -> None:
    answers = found("run", saved, "--data", "digits:test", "--rows", "4", "--stream")["answers"]
    assert len(answers) >= 4
    assert answers[-1]["final"] == 1
    costs = [a["cost"] for a in answers]
    assert costs == sorted(costs)
    assert len(answers[0]["prediction"]) == 4
    assert "rows are at" in call("run", saved, "--data", "digits:test", "--stream").output


def test_a_budget_and_a_deadline(saved: str) -> None:
    (answer,) = found("run", saved, "--data", "digits:test", "--budget", "0.5")["answers"]
    assert answer["cost"] <= 0.5
    assert answer["stopped"] == "budget"
    for executor in ("compact", "simulate"):
        (answer,) = found("run", saved, "--data", "digits:test", "--deadline-ms", "0", "--executor", executor)["answers"]
        assert answer["at"] == ["exit_0"]
        assert answer["late"]
        assert answer["stopped"] == "deadline"
    assert "late: even the first exit" in call("run", saved, "--data", "digits:test", "--deadline-ms", "0").output
    (answer,) = found("run", saved, "--data", "digits:test", "--deadline-ms", "60000")["answers"]
    assert answer["at"] == ["model"]


def test_limits_that_make_no_sense(saved: str) -> None:
    assert "a budget is a fraction" in call("run", saved, "--data", "digits:test", "--budget", "50", code=2).output
    closed = ("run", saved, "--data", "digits:test", "--threshold", "2", "--deadline-ms", "5")
    assert "every exit is closed" in call(*closed, code=2).output
    late = ("run", saved, "--data", "digits:test", "--executor", "reference", "--deadline-ms", "5")
    assert "cannot keep a deadline" in call(*late, code=2).output
    alone = ("run", saved, "--data", "digits:test", "--executor", "simulate", "--stream")
    assert "needs the host between exits" in " ".join(call(*alone, code=2).output.split())


def test_calibrate_for_a_budget(saved: str, tmp_path: Path) -> None:
    out = str(tmp_path / "fast")
    report = found("calibrate", saved, "--data", "digits:val", "--budget", "0.6", "-o", out)
    assert report["mean_cost"] <= 0.6
    assert all(e["open"] for e in report["exits"])
    evaluation = found("evaluate", out, "--data", "digits:test", "--budgets")
    assert len(evaluation["degradation"]) == len(report["exits"])
    both = ("calibrate", saved, "--data", "digits:val", "--budget", "0.6", "--max-drop", "0.01")
    assert "a budget fixes the cost, a drop the accuracy" in call(*both, code=2).output
    assert "at least" in call("calibrate", saved, "--data", "digits:val", "--budget", "0.001", code=2).output


def test_strategies_are_listed_with_their_papers() -> None:
    listed = {s["name"]: s for s in found("strategies")["strategies"]}
    assert "AdaLoss" in listed["ann"]["paper"]
    assert "Anytime prediction" in listed["anytime"]["paper"]
