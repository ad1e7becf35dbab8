"""The driver of the GPU benchmark on the CPU: tiny models, the simulator, and a clock of the host. No GPU is claimed."""

from __future__ import annotations

import json
import math

import pytest
import torch

from tests.bench import record
from tests.bench.gpu import __main__ as program
from tests.bench.gpu import mixes, nodes, plan, predictions, rivals, subjects, table
from tests.bench.gpu.cases import Case, Found, Setting, confidences, same
from tests.bench.gpu.platform import CONDITIONS, Host
from tests.bench.readme import README
from tests.test_bench import FIGURE

HOST = Setting(Host(), rounds=2, check=1e-3)
ABOUT = {"command", "about", "date", "seconds", "machine", "problems", "figures"}


def check(whole: dict) -> None:
    """The form that the table and the README read."""
    assert set(whole) == {"groups"}
    for part, result in whole["groups"].items():
        assert part in plan.BY_NAME
        assert set(result) - {"costs, us"} == ABOUT
        assert result["command"] == f"python -m tests.bench.gpu --only {part}"
        names = [f["name"] for f in result["figures"]]
        assert len(names) == len(set(names)) > 0
        for f in result["figures"]:
            assert set(f) == set(FIGURE) | {"predicted", "why predicted"}
            assert all(isinstance(f[k], kind) for k, kind in FIGURE.items()), f
            assert math.isfinite(f["value"])


def run(tmp_path, *parts: str) -> dict:
    out = tmp_path / "gpu.json"
    argv = ["--device", "cpu", "--small", "--rounds", "2", "--out", str(out)]
    assert program.main([*argv, *(word for part in parts for word in ("--only", part))]) == 0
    whole = json.loads(out.read_text())
    check(whole)
    assert all(result["problems"] == [] for result in whole["groups"].values())
    return whole


@pytest.fixture(scope="module")
def bert() -> subjects.Subject:
    torch.manual_seed(0)
    made = subjects.bert(torch.device("cpu"), torch.float32, small=True)
    made.tell_apart()
    return made


def test_parts_run_and_their_targets_were_predicted(tmp_path, capsys):
    """Every rival of a case was built, agreed with the reference and was timed: a problem would be on record."""
    whole = run(tmp_path, "nodes", "kernels", "bert-1", "bert-32", "tuned-bert-1")
    figures = {f["name"]: f for result in whole["groups"].values() for f in result["figures"]}
    assert [name for name, f in figures.items() if f["target"] and f["predicted"] is None] == []
    of = {part: {f["name"] for f in result["figures"]} for part, result in whole["groups"].items()}
    assert {f"BERT-base, batch 1, {mix}: against the host branch" for mix in mixes.MIXES[1:]} <= of["bert-1"]
    assert "BERT-base, batch 32, 50/25/25: against waiting for all" in of["bert-32"]
    assert figures["BERT-base, batch 32, 50/25/25: of the ideal"]["detail"]["leaving"] == [16, 8, 8, 0, 0]
    assert set(figures["BERT-base, batch 1, 50/25/25: of the ideal"]["medians_ms"]) == {
        "device", "original, one graph", "ideal", "host branch", "host branch, graphs"
    }  # fmt: skip
    shown = capsys.readouterr().out
    assert "predicted" in shown
    assert "BERT-base, batch 1, nobody leaves: over the original, one graph" in shown


@pytest.mark.parametrize("part", ["vit-1", "resnet-32"])
def test_the_plain_models_run_too(tmp_path, part):
    names = {f["name"] for f in run(tmp_path, part)["groups"][part]["figures"]}
    assert len(names) == 13


def test_torch_cond_by_hand_agrees(bert):
    found = Found()
    with torch.no_grad():
        case = Case(bert, 8, "50/25/25", confidences(bert))
        call = rivals.conditional(HOST.platform, bert, case.chosen.thresholds)
        same([call(x) for x in case.inputs], case.answers, 1e-3)
    assert found.problems == []


def test_an_original_that_no_graph_takes_is_captured_in_pieces(bert, monkeypatch):
    from tests.bench.gpu import cases

    found = Found()
    with torch.no_grad():
        case = Case(bert, 8, "nobody leaves", confidences(bert))
        monkeypatch.setattr(bert, "logits", lambda x: 1 / 0)
        line = cases.enter(case, HOST, found)
    assert set(line.calls) == {cases.DEVICE, cases.ORIGINAL}
    assert len(found.problems) == 1


def test_a_rival_that_is_wrong_is_a_problem_and_not_a_figure(bert, monkeypatch):
    """Neither one whose answers differ nor one that cannot be built is timed; the others are."""
    from tests.bench.gpu import cases

    monkeypatch.setattr(rivals.HostBranch, "waiting", lambda self, x: 1 / 0)
    monkeypatch.setattr(rivals.HostBranch, "survivors", lambda self, x: self.subject.logits(x))
    found = Found()
    with torch.no_grad():
        case = Case(bert, 8, "50/25/25", confidences(bert))
        line = cases.enter(case, HOST, found)
    assert cases.ROWS not in line.calls
    assert set(line.calls) == {cases.DEVICE, cases.ORIGINAL, cases.IDEAL, cases.WAITING}
    assert len(found.problems) == 1
    assert "answers differ" in found.problems[0]


def test_the_ideal_runs_the_survivors_and_knows_their_answers(bert):
    with torch.no_grad():
        case = Case(bert, 8, "50/25/25", confidences(bert))
        ideal = rivals.BareStages(HOST.platform, bert, case.exits[0], case.inputs[0])
        assert ideal.sizes == [8, 4, 2]
        same([ideal(case.inputs[0])], case.answers, 1e-4)
        never = Case(bert, 8, "nobody leaves", confidences(bert))
        ideal = rivals.BareStages(HOST.platform, bert, never.exits[0], never.inputs[0])
        assert ideal.sizes == [8] * 5
        same([ideal(never.inputs[0])], never.full, 1e-4)


@pytest.mark.parametrize("mix", mixes.MIXES)
@pytest.mark.parametrize("n", [4, 32, 128])
def test_mixes_are_exact(mix, n):
    """For any confidences, ties and NaN included."""
    made = torch.Generator().manual_seed(n)
    found = [torch.rand(512, generator=made) for _ in range(4)]
    found[0][:40] = 0.5
    found[1][::50] = math.nan
    counts = mixes.leaving(mix, n, 4)
    chosen = mixes.choose(found, counts, n)
    assert len(set(chosen.rows.tolist())) == n
    assert all(0 <= t <= 1 for t in chosen.thresholds)
    taken = torch.full((n,), 4)
    for k in reversed(range(4)):
        taken[found[k][chosen.rows] >= chosen.thresholds[k]] = k
    assert torch.equal(taken, chosen.exits)
    assert [int((taken == k).sum()) for k in range(4)] == counts
    assert chosen.margin > 0.005


def test_mixes_that_cannot_be():
    with pytest.raises(ValueError, match="four divides"):
        mixes.leaving("50/25/25", 6, 4)
    with pytest.raises(ValueError, match="for the end, wanted 8"):
        mixes.choose([torch.ones(8)], [0], 8)
    with pytest.raises(ValueError, match="for exit 0, wanted 4"):
        mixes.choose([torch.full((4,), math.nan)], [4], 4)


def test_what_runs_out_of_time_is_left_out_and_the_rest_is_on_disk(tmp_path, monkeypatch):
    clock = iter(range(0, 10_000, 20))
    monkeypatch.setattr(plan.time, "perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr(plan, "begin", lambda part, subject, options, found: found.add(record.Figure("x", 1.0, "us")))
    out, said = tmp_path / "gpu.json", []
    left_out = plan.run(plan.PARTS, plan.Options(HOST, out, seconds=200.0, say=said.append))
    assert left_out[-1] == plan.PARTS[-1].name
    assert set(json.loads(out.read_text())["groups"]) | set(left_out) == set(plan.BY_NAME)
    assert said[0] == f"16 parts, about {sum(p.seconds for p in plan.PARTS):.0f} s expected, 200 s allowed"


def test_a_part_that_is_killed_leaves_its_figures(tmp_path, monkeypatch):
    def killed(part, subject, options, found):
        found.add(record.Figure("x", 1.0, "us"))
        raise KeyboardInterrupt

    monkeypatch.setattr(plan, "begin", killed)
    out = tmp_path / "gpu.json"
    with pytest.raises(KeyboardInterrupt):
        plan.run(plan.PARTS[:1], plan.Options(HOST, out, say=lambda line: None))
    assert json.loads(out.read_text())["groups"]["nodes"]["figures"][0]["name"] == "x"


def test_costs_of_nodes():
    per = {"k": 1.0, "set": 2.0, "set, IF taken, k": 8.0, "set, IF not taken": 5.0}
    figures = [record.Figure(f"per node: {name}", value, "us") for name, value in per.items()]
    assert nodes.costs(figures) == {"IF taken": 5.0, "IF not taken": 3.0}
    CONDITIONS.clear()


def test_predictions_say_why():
    for name, said in predictions.known().items():
        assert set(said) == {"H100", "H200", "why"}, name
        assert said["H100"] > 0
        assert said["H200"] > 0
        assert len(said["why"]) > 20
    assert predictions.beside({"name": "decide: 1 rows, 2 classes"}, "NVIDIA H200")["predicted"] is not None
    assert predictions.beside({"name": "nothing of the kind"}, "NVIDIA H200")["predicted"] is None


def test_the_readmes_table_is_that_of_the_files():
    wholes = [record.read(path) for path in sorted(record.RESULTS.glob("gpu-*.json"))]
    for whole in wholes:
        check(whole)
    text = README.read_text()
    assert table.placed(text, table.markdown(wholes)) == text, "run python -m tests.bench.gpu --readme"
    figure = record.Figure("x", 1.234, "us", 0.01, 9, record.Target(6.0)).to_dict()
    machine = {"device": "NVIDIA H100", "dtype": "float16", "versions": {"torch": "2"}}
    whole = {
        "groups": {"nodes": {"machine": machine, "problems": ["y: broke"], "figures": [predictions.beside(figure, "")]}}
    }
    made = table.markdown([whole]).splitlines()
    assert made[2] == "| x | 1.23 us | 0.01 | - | at most 6 | met | `--only nodes` |"
    assert "- Not measured: y: broke" in made
    assert table.markdown([]) == table.NOT_RUN


def test_what_the_command_refuses(capsys):
    refused = [(["--rounds", "3"], "at least 7"), (["--device", "cpu"], "--small"), (["--small"], "--out")]
    for argv, said in refused + ([] if torch.cuda.is_available() else [([], "no CUDA device")]):
        with pytest.raises(SystemExit) as stopped:
            program.main(argv)
        assert stopped.value.code == 2
        assert said in capsys.readouterr().err
