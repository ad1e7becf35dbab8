"""The driver of the GPU benchmark on the CPU: tiny models, the simulator, and a clock of the host. No GPU is claimed."""

from __future__ import annotations

import json
import math

import pytest
import torch

from tests.bench.gpu import __main__ as program
from tests.bench.gpu import cases, mixes, rivals, subjects
from tests.bench.gpu.cases import Case, Found, Setting, confidences
from tests.bench.gpu.platform import Host
from tests.test_bench import FIGURE

pytestmark = pytest.mark.nightly  # tests of a harness

HOST = Setting(Host(), rounds=2, check=1e-3)


@pytest.fixture(scope="module")
def bert() -> subjects.Subject:
    return subjects.made("bert", torch.device("cpu"), True, torch.float32)


@pytest.mark.parametrize("parts", [["kernels", "bert-1", "bert-32"], ["resnet-1"]])
def test_parts_run(tmp_path, capsys, parts):
    """Every rival of a case was built, agreed with the reference and was timed: a problem would be on record."""
    out = tmp_path / "gpu.json"
    asked = [word for part in parts for word in ("--only", part)]
    assert program.main(["--small", "--out", str(out), *asked]) == 0
    groups = json.loads(out.read_text())["groups"]
    assert set(groups) == set(parts)
    assert "left out: nothing" in capsys.readouterr().out
    for part, result in groups.items():
        assert result["problems"] == []
        assert result["command"] == f"python -m tests.bench.gpu --only {part}"
        for f in result["figures"]:
            assert all(isinstance(f[k], kind) for k, kind in FIGURE.items()), f
            assert math.isfinite(f["value"])
        if "-" in part:
            assert len(result["figures"]) == 13
    if "bert-1" in groups:
        figures = {f["name"]: f for f in groups["bert-1"]["figures"] + groups["bert-32"]["figures"]}
        assert figures["BERT-base, batch 32, 50/25/25: of the ideal"]["detail"]["leaving"] == [16, 8, 8, 0, 0]
        assert set(figures["BERT-base, batch 1, 50/25/25: of the ideal"]["medians_ms"]) == {
            "device", "original, one graph", "ideal", "host branch", "host branch, graphs"
        }  # fmt: skip


def test_a_rival_that_is_wrong_is_a_problem_and_not_a_figure(bert, monkeypatch):
    """Neither one whose answers differ nor one that cannot be built is timed; the others are."""
    monkeypatch.setattr(rivals.HostBranch, "survivors", lambda self, x: self.subject.logits(x))
    found = Found()
    with torch.no_grad():
        line = cases.enter(Case(bert, 8, "50/25/25", confidences(bert)), HOST, found)
    assert set(line.calls) == {cases.DEVICE, cases.ORIGINAL, cases.IDEAL, cases.WAITING}
    assert len(found.problems) == 1
    assert "answers differ" in found.problems[0]
    with torch.no_grad():
        case = Case(bert, 8, "no row leaves", confidences(bert))
        monkeypatch.setattr(bert, "logits", lambda x: 1 / 0)
        line = cases.enter(case, HOST, found)
    assert set(line.calls) == {cases.DEVICE, cases.ORIGINAL}  # captured in pieces
    assert len(found.problems) == 2


@pytest.mark.parametrize("mix", mixes.MIXES)
def test_mixes_are_exact(mix):
    """For any confidences, ties and NaN included."""
    n = 32
    made = torch.Generator().manual_seed(n)
    found = [torch.rand(512, generator=made) for _ in range(4)]
    found[0][:40] = 0.5
    found[1][::50] = math.nan
    counts = mixes.leaving(mix, n, 4)
    chosen = mixes.choose(found, counts, n)
    taken = torch.full((n,), 4)
    for k in reversed(range(4)):
        taken[found[k][chosen.rows] >= chosen.thresholds[k]] = k
    assert torch.equal(taken, chosen.exits)
    assert [int((taken == k).sum()) for k in range(4)] == counts
    with pytest.raises(ValueError, match="for exit 0, wanted 4"):
        mixes.choose([torch.full((4,), math.nan)], [4], 4)
