"""Each example as a user runs it: ``python -m examples.NAME --quick``, with no network and an empty cache.

Those that `make test` runs do so in this process: to import torch anew takes longer than most of them.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import runpy
import subprocess
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from examples.act_recurrent import ranks

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A cache that the programs share, and no registry within reach."""
    cache = tmp_path_factory.mktemp("cache")
    kept = {k: v for k, v in os.environ.items() if not k.startswith("EECOMPILE")}
    nowhere = {"https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1"}
    return kept | nowhere | {"EECOMPILE_DATA": str(cache / "data"), "EECOMPILE_RUNS": str(cache / "runs")}


def run(name: str, environment: dict[str, str], out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"examples.{name}", "--quick", "--threads", "1", "--out", str(out), *more]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def here(name: str, environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """``python -m examples.NAME ARGUMENTS``, in this process."""
    command, out, err = [f"examples.{name}", *arguments], io.StringIO(), io.StringIO()
    with (
        patch.dict(os.environ, environment, clear=True),
        patch.object(sys, "argv", command),
        redirect_stdout(out),
        redirect_stderr(err),
        warnings.catch_warnings(),
        torch.random.fork_rng(devices=[]),
    ):
        warnings.simplefilter("ignore")
        with pytest.raises(SystemExit) as ended:
            runpy.run_module(command[0], run_name="__main__")
    return subprocess.CompletedProcess(command, ended.value.code, out.getvalue(), err.getvalue())


def quick(name: str, environment: dict[str, str], out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    done = here(name, environment, "--quick", "--threads", "1", "--out", str(out), *more)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def check_row(row: dict[str, Any], sizes: set[str]) -> None:
    """Figures that hang together: the saving is there, at a price that was allowed, and time was taken."""
    assert sum(row["share"].values()) == pytest.approx(1)
    assert row["accuracy"] > row["full_accuracy"] - 0.05
    assert row["full_accuracy"] > 0.85
    assert set(row["speedup"]) == set(row["seconds"]) == sizes
    if row["calibration"]["qualified"]:
        assert 0 < row["cost"] < 1
    else:
        assert row["cost"] == pytest.approx(1)
        assert "all exits are closed" in row["guarantee"]


def test_branchy_lenet(environment: dict[str, str], tmp_path: Path) -> None:
    trained = quick("branchy_lenet", environment, tmp_path, "--until", "train")
    assert "done until 'train'" in trained.stderr
    assert not list(tmp_path.iterdir())
    done = quick("branchy_lenet", environment, tmp_path, "--json")
    assert "epoch" not in done.stderr  # what was trained is kept
    found = json.loads(done.stdout)
    assert found == json.loads((tmp_path / "branchy_lenet-quick.json").read_text())
    assert [(row["what"], row["thresholds"]) for row in found["rows"]] == [
        (f"MNIST, LeNet, {exits}", promise) for exits in ("2 exits", "1 exit") for promise in ("guaranteed", "empirical")
    ]
    for row in found["rows"]:
        check_row(row, {"1", "32", "256"})
        assert set(row["onnx"]["speedup"]) == set(row["onnx"]["seconds"]) == {"1", "32", "256"}
        assert row["calibration"]["qualified"]
        assert [e["after"] for e in row["exits"]] == (["relu", "relu_1"] if "2 exits" in row["what"] else ["relu"])
        assert row["constant"]["cost"] <= row["cost"] + 1e-9
        assert row["random"] is None or row["random"]["accuracy"] >= row["constant"]["accuracy"] - 1e-9
        assert row["full_accuracy"] == pytest.approx(row["original_accuracy"])  # the trunk stays as it is
    assert found["rows_of_data"] == {"train": 1024, "val": 512, "test": 512}
    assert {head["exit"] for head in found["fit"]["heads"]} == {"exit_0", "exit_1"}


@pytest.mark.nightly
def test_branchy_resnet(environment: dict[str, str], tmp_path: Path) -> None:
    run("branchy_resnet", environment, tmp_path, "--until", "evaluate")
    without = json.loads((tmp_path / "branchy_resnet-quick.json").read_text())
    assert without["timed"] is False and all("speedup" not in row for row in without["rows"])
    found = json.loads(run("branchy_resnet", environment, tmp_path, "--json").stdout)
    kept = [(row["accuracy"], row["cost"]) for row in without["rows"]]
    assert [(row["accuracy"], row["cost"]) for row in found["rows"]] == kept
    assert [row["thresholds"] for row in found["rows"]] == ["guaranteed", "empirical"]
    for row in found["rows"]:
        check_row(row, {"1", "32", "64"})
        assert [(e["after"], e["head"]) for e in row["exits"]] == [("stage1", "Branch"), ("stage2", "Branch")]


@pytest.mark.nightly
def test_branchy_charts(environment: dict[str, str], tmp_path: Path) -> None:
    found = json.loads(run("branchy_charts", environment, tmp_path, "--json").stdout)
    assert [row["thresholds"] for row in found["rows"]] == ["guaranteed", "empirical"]
    for row in found["rows"]:
        check_row(row, {"1", "32", "256"})
        assert [(e["after"], e["head"]) for e in row["exits"]] == [(f"layers.{k}", "Branch") for k in range(3)]
    assert found["rows"][1]["cost"] < 0.7


@pytest.mark.nightly
def test_act_code(environment: dict[str, str], tmp_path: Path) -> None:
    found = json.loads(run("act_code", environment, tmp_path, "--json").stdout)
    for row in found["rows"]:
        assert sum(row["share"].values()) == pytest.approx(1)
        assert row["accuracy"] > row["full_accuracy"] - 0.05
        assert all(1 <= steps <= 4 for steps in row["steps_by_tag"].values())
        assert [name for name, *_ in row["constants"]] == ["1 block", "4 blocks"]
    assert found["rows"][1]["cost"] <= found["rows"][0]["cost"]


@pytest.mark.nightly
def test_mebert_imdb(environment: dict[str, str], tmp_path: Path) -> None:
    found = json.loads(run("mebert_imdb", environment, tmp_path, "--json").stdout)
    assert found["chosen"] in ("joint", "frozen")
    assert found[found["chosen"]]["cost_at_choice"] == min(found[how]["cost_at_choice"] for how in ("joint", "frozen"))
    assert [(row["what"].split(", ")[-1], row["thresholds"]) for row in found["rows"]] == [
        (criterion, promise) for criterion in ("entropy", "patience") for promise in ("guaranteed", "empirical")
    ]
    for row in found["rows"]:
        check_row(row, {"1", "32"})
        assert len(row["exits"]) == 5  # after every block but the last, which is the model's own end
    assert any(row["calibration"]["qualified"] for row in found["rows"])
    full = {row["full_accuracy"] for row in found["rows"]}
    assert len(full) == 1  # both criteria judge the same weights


@pytest.mark.nightly
def test_depth_adaptive_text(environment: dict[str, str], tmp_path: Path) -> None:
    found = json.loads(run("depth_adaptive_text", environment, tmp_path, "--json").stdout)
    assert [(row["what"].split(", ")[-1], row["thresholds"]) for row in found["rows"]] == [
        (mode, how) for mode in ("up_front", "halting") for how in ("as trained", "guaranteed", "empirical")
    ]
    for row in found["rows"]:
        assert sum(row["share"].values()) == pytest.approx(1)
        steps = [n * share for n, share in enumerate(row["share"].values())]
        assert sum(steps) == pytest.approx(row["mean_steps"], abs=1e-5)
        assert row["accuracy_at_depth"][-1] == pytest.approx(row["full_accuracy"])
        assert row["accuracy"] > row["full_accuracy"] - 0.05
        # 128 rows are few for a guarantee of 1%: all blocks may run.
        assert 0 < row["cost"] < (1.01 if row["thresholds"] == "guaranteed" else 0.9)
        assert set(row["speedup"]) == {"1", "32", "64"}
    assert len({row["full_accuracy"] for row in found["rows"]}) == 1  # the second program leaves the trunk as it is


@pytest.mark.nightly
def test_skipnet_cifar(environment: dict[str, str], tmp_path: Path) -> None:
    found = json.loads(run("skipnet_cifar", environment, tmp_path, "--json").stdout)
    assert [(row["what"], row["thresholds"]) for row in found["rows"]] == [
        ("stand-in for CIFAR-10, ResNet-8, gates", how) for how in ("as trained", "guaranteed")
    ]
    for row in found["rows"]:
        assert list(row["share"]) == ["gate_0"]  # the other two blocks change the shape
        assert row["accuracy"] > row["full_accuracy"] - 0.03
        assert row["full_accuracy"] > row["original_accuracy"] - 0.03  # full rows keep it
        assert 0.5 < row["cost"] <= 1.0
        assert set(row["speedup"]) == {"1", "64"}


@pytest.mark.nightly
def test_self_adaptive_images(environment: dict[str, str], tmp_path: Path) -> None:
    found = json.loads(run("self_adaptive_images", environment, tmp_path, "--json").stdout)
    alone, exits = found["rows"]
    assert alone["share"] == {"exit_0": 0.0, "end": 1.0}
    assert exits["cost"] <= alone["cost"] + 0.1
    for row in (alone, exits):
        assert list(row["open"]) == ["stage1"]
        assert row["accuracy"] > row["full_accuracy"] - 0.1
        assert set(row["speedup"]) == {"1", "32", "64"}


@pytest.mark.nightly
def test_self_adaptive_text(environment: dict[str, str], tmp_path: Path) -> None:
    found = json.loads(run("self_adaptive_text", environment, tmp_path, "--json").stdout)
    alone, exits = found["rows"]
    assert alone["share"] == {"exit_0": 0.0, "end": 1.0}
    assert alone["gate_thresholds"] == [0.5] * len(alone["open"])
    for row in (alone, exits):
        kinds = {region.rpartition(":")[2] for region in row["open"]}
        assert kinds == {"attention", "mlp"}
        assert not any("layer.0" in region for region in row["open"])
        assert row["accuracy"] > row["full_accuracy"] - 0.1
        assert 0 < row["cost"] < 1.05
        assert set(row["speedup"]) == {"1", "32", "64"}


@pytest.mark.nightly
def test_routing(environment: dict[str, str], tmp_path: Path) -> None:
    found = json.loads(run("routing", environment, tmp_path, "--json").stdout)
    assert [(row["what"].split()[-1], row["thresholds"]) for row in found["rows"]] == [
        ("version", "as trained"),
        ("version", "at most 2% lost, guaranteed"),
        ("exits", "as trained"),
        ("exits", "at most 2% lost, guaranteed"),
    ]
    for row in found["rows"]:
        assert sum(row["share"].values()) == pytest.approx(1)
        assert list(row["share"]) == (["light", "full"] if "light" in row["what"] else ["exit_0", "model"])
        assert 0 < row["by_chance"] <= 1
        assert row["full_accuracy"] > 0.85
        assert set(row["speedup"]) == {"1", "64"}
    costs = [tried["cost"] for tried in found["calibration"]["light"]["curve"][:-2]]  # then all rows, and as it was
    assert costs == sorted(costs, reverse=True), "the more rows take the light way, the less they cost"
    assert found["rows"][1]["accuracy"] > found["rows"][1]["full_accuracy"] - 0.1


@pytest.mark.nightly
def test_quantized_text(environment: dict[str, str], tmp_path: Path) -> None:
    pytest.importorskip("torchao.quantization.pt2e")
    pytest.importorskip("onnxruntime")
    found = json.loads(run("quantized_text", environment, tmp_path, "--json").stdout)
    rows = {row["what"].rpartition("Runtime, ")[2]: row for row in found["rows"]}
    assert list(rows) == ["fp32", "int8", "int8 by ONNX Runtime", "fp32 and exits", "int8 and exits"]
    for name in ("fp32 and exits", "int8 and exits"):
        check_row(rows[name], {"1", "32"})
        assert rows[name]["exported_accuracy"] == pytest.approx(rows[name]["accuracy"], abs=0.02)
    assert rows["int8"]["megabytes"] < rows["fp32"]["megabytes"]


def test_a_missing_package_is_said_before_anything_is_trained(environment: dict[str, str], tmp_path: Path) -> None:
    with patch.dict(sys.modules, {"torchao": None}):
        done = here("quantized_text", environment, "--quick", "--out", str(tmp_path))
    assert done.returncode == 2
    assert "pip install torchao" in done.stderr and "epoch" not in done.stderr


def test_errors_are_one_line(environment: dict[str, str], tmp_path: Path) -> None:
    """Without network and without --quick there is no data: said in a sentence, with what to do."""
    done = here("branchy_lenet", environment | {"PATH": str(tmp_path)}, "--out", str(tmp_path))
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "no command 'npm' here" in done.stderr
    assert "--quick runs on a generated stand-in" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", sorted(p.stem for p in (ROOT / "examples").glob("*.py")))
def test_imports(name: str) -> None:
    """What an example takes from the package is there."""
    importlib.import_module(f"examples.{name}")


@pytest.mark.nightly
def test_help_has_examples(environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "examples.mebert_imdb", "--help"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert "python -m examples.mebert_imdb --until train" in done.stdout
    assert "trained jointly" in done.stdout


@pytest.mark.parametrize(
    ("name", "models"),
    [("images", ["tinyconv", "resnet8", "resnet20"]), ("text", ["bagofwords", "minilm3", "minilm6"])],
)
@pytest.mark.nightly
def test_cascades(environment: dict[str, str], tmp_path: Path, name: str, models: list[str]) -> None:
    found = json.loads(run(f"cascade_{name}", environment, tmp_path, "--json").stdout)
    assert list(found["models"]) == models
    for row in found["rows"]:
        check_row(row, {"1", "32", *(["256"] if name == "images" else [])})
        assert [(e["after"], e["head"]) for e in row["exits"]] == [(m, "identity") for m in models[:-1]]
        assert row["original_accuracy"] == row["full_accuracy"]  # nothing was trained


@pytest.mark.nightly
def test_ann_budget(environment: dict[str, str], tmp_path: Path) -> None:
    found = json.loads(run("ann_budget", environment, tmp_path, "--json").stdout)
    assert {row["what"] for row in found["rows"]} <= {
        "MSDNet, Fashion-MNIST, AdaLoss",
        "MSDNet, Fashion-MNIST, equal weights",
    }
    for balance in ("adaloss", "fixed"):
        curves = found[f"{balance}_curves"]
        strategy = found[balance]["fit"]["settings"]["strategy"]
        assert strategy.get("balance", "adaloss") == balance  # what is as usual is not repeated
        for method in ("search", "quota"):
            points = curves[method]["points"]
            assert points
            for p in points:
                assert p["calibration"]["cost"] <= p["budget"] + 1e-6
            right = [p["calibration"]["accuracy"] for p in curves["search"]["points"]]
            assert right == sorted(right)
        assert curves["no image above"][-1]["stopped"] == 0


@pytest.mark.nightly
def test_anytime_stream(environment: dict[str, str], tmp_path: Path) -> None:
    found = json.loads(run("anytime_stream", environment, tmp_path, "--json").stdout)
    assert 2 <= len(found["stream"]) <= len(found["exits"]) + 1
    right = found["accuracy_by_exit"]
    best = max(right, key=lambda how: sum(right[how]["val"]))
    assert sum(right[found["chosen"]]["val"]) == sum(right[best]["val"])
    assert {right[how]["test"][-1] for how in right} == {found["rows"][0]["full_accuracy"]}
    for load in ("idle", "one core busy"):
        assert len(found["sweep"][load]) == 3
        for point in found["sweep"][load]:
            assert 0 < point["cost"] <= 1.2  # all heads of a small model
            assert point["late_after_a_later_exit"] <= point["late"]


def test_act_recurrent(environment, tmp_path):
    quick("act_recurrent", environment, tmp_path)
    made = json.loads((tmp_path / "act_recurrent-quick.json").read_text())
    assert [(row["what"].split(",")[0], row["thresholds"]) for row in made["rows"]] == [
        (task, how) for task in ("parity", "addition", "logic") for how in ("as trained", "guaranteed")
    ]
    for row in made["rows"]:
        assert sum(row["share"].values()) == pytest.approx(1)
        assert 0 < row["cost"] < 1.01  # of six steps, and of the halting units
        assert -1 <= row["rank_correlation"] <= 1
        assert len(row["constants"]) == 2
        by_level = row["steps_by_difficulty"]
        assert len(by_level) == {"parity": 8, "addition": 5, "logic": 6}[row["what"].split(",")[0]]
        assert all(1 <= steps <= 6 for steps in by_level.values())


def test_ranks_are_those_of_spearman():
    assert ranks(torch.tensor([3, 1, 3, 2])).tolist() == [3.5, 1, 3.5, 2]


@pytest.mark.nightly
def test_act_text(environment: dict[str, str], tmp_path: Path) -> None:
    found = json.loads(run("act_text", environment, tmp_path, "--json").stdout)
    assert [(row["what"].split(", ")[-1], row["thresholds"]) for row in found["rows"]] == [
        (who, how) for who in ("reviews halt", "tokens halt") for how in ("as trained", "at most 1% lost on val")
    ]
    for row in found["rows"]:
        assert sum(row["share"].values()) == pytest.approx(1)
        steps = [n * share for n, share in enumerate(row["share"].values(), 1)]
        assert sum(steps) == pytest.approx(row["mean_steps"], abs=1e-5)
        assert row["accuracy"] > 0.85
        assert 0 < row["cost"] < 1.05
        assert set(row["speedup"]) == {"1", "32", "64"}
    for who in ("reviews", "tokens"):
        curve = found[f"{who}_on_val"]
        assert curve[0]["mean_steps"] < curve[-1]["mean_steps"]  # a lower threshold stops sooner
    assert found["rows"][3]["cost"] <= found["rows"][2]["cost"]
