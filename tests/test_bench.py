"""The harness of the benchmarks on small real models: what it writes, and that its arithmetic is right."""

from __future__ import annotations

import json
import math

import pytest
import torch

from eecompile.measuring import Rounds
from eecompile.strategies import SkipNet
from tests.bench import __main__ as program
from tests.bench import gates, groups, models, page, record, saving
from tests.bench.record import Figure, Target, merge, timed
from tests.bench.rivals import BareStages, ByHand
from tests.support import watch

FIGURE = {
    "name": str,
    "value": float,
    "unit": str,
    "spread": float,
    "rounds": int,
    "target": (str, type(None)),
    "met": (bool, type(None)),
    "cause": (str, type(None)),
    "medians_ms": dict,
    "spreads_ms": dict,
    "others": (float, type(None)),
    "redone": int,
    "disturbed": bool,
    "detail": dict,
}


def check(whole: dict) -> None:
    """The schema that the page's table and others read."""
    assert set(whole) == {"groups"}
    for group, result in whole["groups"].items():
        assert group in groups.GROUPS
        assert set(result) == {"command", "about", "date", "seconds", "machine", "figures"}
        assert result["command"].startswith("python -m tests.bench --only " + group)
        assert {"processor", "threads", "cpus", "python", "versions", "device"} <= set(result["machine"])
        names = [f["name"] for f in result["figures"]]
        assert len(names) == len(set(names)) > 0
        for f in result["figures"]:
            assert set(f) == set(FIGURE)
            assert all(isinstance(f[k], kind) for k, kind in FIGURE.items()), f
            assert (f["target"] is None) == (f["met"] is None)
            assert math.isfinite(f["value"])


@pytest.mark.nightly
@pytest.mark.parametrize("group", ["closed", "no-exit", "memory", "deadlines", "export", "backends"])
def test_a_group_runs_and_is_merged(tmp_path, capsys, group):
    out = tmp_path / "cpu.json"
    other = {
        "command": "python -m tests.bench --only compile",
        "about": "",
        "date": "",
        "seconds": 1.0,
        "machine": {},
        "figures": [],
    }
    merge(out, "compile", other)
    assert program.main(["--only", group, "--small", "--rounds", "3", "--threads", "1", "--out", str(out)]) == 0
    whole = json.loads(out.read_text())
    assert whole["groups"].pop("compile") == other
    check(whole)
    assert "LeNet" in capsys.readouterr().out
    for f in whole["groups"][group]["figures"]:
        if f["medians_ms"]:
            assert f["rounds"] == 3
            assert 0 < f["value"] < 50


@pytest.mark.nightly
@pytest.mark.parametrize("group", ["serving", "advice", "monitor"])
def test_groups_of_servers_monitors_and_advice(tmp_path, group):
    out = tmp_path / "cpu.json"
    assert program.main(["--only", group, "--small", "--rounds", "3", "--threads", "1", "--out", str(out)]) == 0
    whole = json.loads(out.read_text())
    check(whole)
    assert all(0 < f["value"] < 5 for f in whole["groups"][group]["figures"])


@pytest.mark.nightly
def test_gates_are_shut_for_the_rows_that_are_asked_for(tmp_path):
    out = tmp_path / "cpu.json"
    assert program.main(["--only", "gates", "--small", "--rounds", "3", "--threads", "1", "--out", str(out)]) == 0
    whole = json.loads(out.read_text())
    check(whole)
    figures = whole["groups"]["gates"]["figures"]
    assert [f["name"] for f in figures[::3]] == [f"ResNet-20 at 8, {unit}, all gates open" for unit in gates.UNITS]
    assert [f["detail"].get("rows skipped at each gate") for f in figures] == [None, 2, 5] * 3
    subject = models.resnet(8, SkipNet())
    gates.spread_out(subject)
    gates.close(subject, 0.6)
    with torch.no_grad():
        few = watch(gates.ideal(subject, 0.6)).shapes["convolution"]
        compiled = watch(subject.compiled).shapes["convolution"]
    gated = [shape[0] for shape in compiled if shape[1] > 10]  # a unit's convolution has 10 channels
    assert gated == [shape[0] for shape in few]
    assert gated.count(3) == 14  # two in each of seven blocks


def test_ratios():
    rounds = Rounds({"mine": [1.0, 2.0, 3.0], "theirs": [2.0, 4.0, 6.0]}, [0.0, 0.2, 0.1], redone=4)
    slower = timed("x", rounds, "theirs", "mine", Target(1.5))
    assert (slower.value, slower.met, slower.unit) == (2.0, False, "x the time")
    faster = timed("x", rounds, "mine", "theirs", Target(1.5, "at least"), inverse=True)
    assert (faster.value, faster.met, faster.unit) == (2.0, True, "x as fast")
    made = faster.to_dict()
    assert (made["medians_ms"], made["others"], made["redone"]) == ({"mine": 2000.0, "theirs": 4000.0}, 0.1, 4)
    assert made["disturbed"]
    assert Figure("x", 1.0, "s", target=Target(1.0)).met
    assert Figure("x", 1.0, "s").met is None
    assert (
        "LeNet is 1.100, wanted at most 1.02. Why."
        in record.misses(
            {"groups": {"closed": {"figures": [Figure("LeNet", 1.1, "", target=Target(1.02), cause="Why.").to_dict()]}}}
        )[0]
    )


def test_the_ideal_and_the_rivals_do_the_same_work():
    """Small BERT: the same rows leave at the same exits, and the ideal runs each layer on the rows that survive."""
    import transformers as hf

    torch.manual_seed(0)
    config = hf.BertConfig(
        vocab_size=200, hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64, num_labels=2
    )
    ids = torch.randint(0, 200, (8, 12), generator=torch.Generator().manual_seed(0))
    exits = tuple(f"bert.encoder.layer.{i}" for i in range(3))
    subject = models.Subject(
        "small", hf.BertForSequenceClassification(config), {"input_ids": ids}, models.MeBert(exits=exits, head="linear")
    )
    models.force_mix(subject, (4, 2, 1))
    with torch.no_grad():
        mine = subject.compiled().logits
        hand = ByHand(subject)
        for theirs in (hand.row_by_row(), hand.all_together()):
            torch.testing.assert_close(theirs, mine, atol=1e-5, rtol=1e-5)
        ran: list[tuple[int, int]] = []
        handles = [
            layer.register_forward_pre_hook(lambda m, args, i=i: ran.append((i, len(args[0]))))
            for i, layer in enumerate(subject.model.bert.encoder.layer)
        ]
        BareStages(subject, [8, 4, 2, 1])()
        for h in handles:
            h.remove()
    assert ran == [(0, 8), (1, 4), (2, 2), (3, 1)]
    assert saving.LEAVING == (16, 8, 8)


@pytest.mark.skipif(not (record.RESULTS / "cpu.json").exists(), reason="nothing is recorded yet")
def test_the_recorded_file_has_this_form_and_is_what_the_page_says():
    whole = record.read(record.RESULTS / "cpu.json")
    check(whole)
    text = page.PAGE.read_text()
    assert page.placed(text, page.markdown(whole)) == text, "run python -m tests.bench --page"


def test_the_pages_table():
    figures = [
        Figure("LeNet", 1.1, "x the time", 0.01, 9, Target(1.02), "Why."),
        Figure("bytes", 3.0, "MiB", others=0.5),
    ]
    machine = {"processor": "P", "threads": 2, "isa": "AVX2", "versions": {"torch": "2"}}
    group = {"about": "exits closed", "machine": machine, "figures": [f.to_dict() for f in figures]}
    made = page.markdown({"groups": {"closed": group}}).splitlines()
    assert made[2] == "| LeNet: exits closed | 1.100 x the time | 0.010 | at most 1.02 | **missed** | `--only closed` |"
    assert made[3] == "| bytes: exits closed | 3.000 MiB |  |  |  (disturbed) | `--only closed` |"
    assert made[4:] == ["", "- Missed: LeNet. Why.", "", "Measured on P, 2 threads, AVX2, torch 2."]
    text = f"a\n{page.BEGIN}\nold\n{page.END}\nz"
    assert page.placed(text, "new") == f"a\n{page.BEGIN}\n\nnew\n\n{page.END}\nz"
    with pytest.raises(ValueError, match="has no"):
        page.placed("a", "new")
