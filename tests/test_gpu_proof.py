"""The GPU proof without a GPU: its tests are collected, its probes and helpers hold, its command keeps a record."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from eecompile.kernels import clock, decide, halt
from tests.bench.gpu.platform import Host
from tests.gpu import __main__ as proof
from tests.gpu import carried, carry, parts, probes
from tests.gpu.moving import agree, compiled, moved, run, wide
from tests.gpu.parts import Part
from tests.gpu.test_zoo_on_gpu import check

ROOT = Path(__file__).parents[1]
ON_HOST = ["if_node", "nested_ifs", "switch_node", "while_node", "a_model_in_a_body", "replays_queue_without_the_host"]


def test_every_test_for_a_gpu_is_collected():
    """Without an error, and none of them by `make test`."""
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", "tests/gpu", "-m", "gpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    found = [line for line in done.stdout.splitlines() if "::" in line]
    assert len(found) > 110
    for name in ("synchronises_nothing", "no_copy_to_the_host", "returns_at_once", "ten_thousand", "error_inside_a_body"):
        assert any(name in line for line in found), name
    assert "deselected" not in done.stdout, "tests/gpu has tests that are not marked"


@pytest.mark.parametrize("name", [*ON_HOST, "the_profiler_sees_bodies"])
def test_probes_of_graphs_hold_on_the_host(name):
    with torch.no_grad():
        probes.PROBES[name](Host())


def test_a_probe_can_fail(monkeypatch):
    """A body that runs whatever its condition says."""
    from tests.bench.gpu.platform import OnHost

    monkeypatch.setattr(OnHost, "if_", lambda self, handle, body: body())
    for name in ("if_node", "nested_ifs", "a_model_in_a_body", "replays_queue_without_the_host"):
        with torch.no_grad(), pytest.raises(AssertionError):
            probes.PROBES[name](Host())


def test_the_zoo_check_with_the_simulator():
    check("lenet", torch.float32, "cpu", "simulate", batches=(1, 7))
    check("bert", torch.bfloat16, "cpu", "simulate", structures=("nested",), batches=(7,))


def test_the_zoo_check_can_fail():
    entry, fast = compiled("lenet", device="cpu")
    args, kwargs = moved(entry.inputs(7, seed=1), "cpu", torch.float32)
    confidences = fast.observe(*args, **kwargs).confidences[:-1]
    thresholds = wide(confidences, random.Random(0))
    fast.set_thresholds(thresholds)
    good = run(fast, "simulate", args, kwargs)
    agree(fast, good, good, confidences, thresholds)
    with pytest.raises(AssertionError, match=r"\d, \d"):
        agree(fast, replace(good, exit_index=good.exit_index + 1), good, confidences, thresholds)
    with pytest.raises(AssertionError, match="not close"):
        agree(fast, replace(good, output=good.output + 1), good, confidences, thresholds)


def test_kernels_are_carried_with_their_strides_and_aliases():
    """What shares memory shares it there, what is written comes back, and a result that is an argument is it again."""
    seen = {}

    def launch_something(view, whole, *, options, number):
        seen.update(stride=view.stride(), shared=view.data_ptr() == whole.data_ptr(), here=view is odd)
        view.mul_(2)
        return view, [whole.sum(), number], options[0]

    base, other = torch.arange(12.0).view(3, 4), torch.zeros(2)
    odd = base[:, ::2]
    call = carried.carried(launch_something, "cpu")
    doubled, (total, number), given = call(odd, base, options=[other], number=3)
    assert seen == {"stride": (4, 2), "shared": True, "here": False}
    assert torch.equal(base[:, ::2], torch.arange(12.0).view(3, 4)[:, ::2] * 2)
    assert torch.equal(base[:, 1::2], torch.arange(12.0).view(3, 4)[:, 1::2])
    assert doubled.data_ptr() == base.data_ptr()
    assert doubled.stride() == (4, 2)
    assert (float(total), number, given.data_ptr()) == (float(base.sum()), 3, other.data_ptr())


def test_every_launch_is_carried(monkeypatch):
    for name in carried.MODULES:
        module = sys.modules.get(f"eecompile.kernels.{name}")
        for launch in [n for n in vars(module or object) if n.startswith("launch_")]:
            monkeypatch.setattr(module, launch, getattr(module, launch))  # put back afterwards
    found = carried.install("cpu")
    assert {"decide.launch_decide", "gather.launch_scatter", "clock.launch_tick"} <= set(found)
    assert decide.launch_decide is not found["decide.launch_decide"]
    assert clock.launch_tick.__wrapped__ is found["clock.launch_tick"]
    assert halt.launch_halt.__wrapped__ is found["halt.launch_halt"]


PASSES = "def test_a(): pass\ndef test_b(): pass\n"
FAILS = "import pytest\ndef test_c(): assert 1 == 2\ndef test_d(): pytest.skip('x')\ndef test_e(): pass\n"


def test_the_proof_goes_on_after_failures_and_keeps_a_record(tmp_path, capsys):
    files = {name: tmp_path / f"test_{name}.py" for name in ("good", "bad", "none")}
    for name, text in (("good", PASSES), ("bad", FAILS), ("none", "")):
        files[name].write_text(text)
    pytest_of = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", "/dev/null"]
    python = [sys.executable, "-c"]
    asked = [
        Part("good", "", [*pytest_of, str(files["good"])], 60, "pytest"),
        Part("bad", "", [*pytest_of, str(files["bad"])], 60, "pytest"),
        Part("none", "", [*pytest_of, str(files["none"])], 60, "pytest"),
        Part("hangs", "", [*python, "print('here', flush=True); import time; time.sleep(60)"], 2),
        Part("breaks", "", [*python, "raise SystemExit('no such GPU')"], 60),
        Part("works", "", [*python, "pass"], 60),
    ]
    began = time.perf_counter()
    outcomes = {o.name: o for o in proof.prove(asked, tmp_path / "out", 300, workers=1)}
    assert time.perf_counter() - began < 55, "a part that hangs was waited for"
    assert {name: o.ok for name, o in outcomes.items()} == {
        "good": True, "bad": False, "none": False, "hangs": False, "breaks": False, "works": True
    }  # fmt: skip
    assert outcomes["good"].counts == {"passed": 2, "failed": 0, "skipped": 0}
    assert outcomes["bad"].counts == {"passed": 1, "failed": 1, "skipped": 1}
    assert "assert 1 == 2" in outcomes["bad"].failures["test_bad::test_c"]
    assert outcomes["hangs"].said == "stopped after 2 s"
    assert "here" in outcomes["hangs"].failures["the end of its output"]
    assert "no such GPU" in outcomes["breaks"].failures["the end of its output"]
    written = json.loads((tmp_path / "out" / "proof.json").read_text())
    assert [p["name"] for p in written["parts"]] == [p.name for p in asked]
    assert "no such GPU" in (tmp_path / "out" / "log.txt").read_text()
    assert sum(1 for _ in (tmp_path / "out").iterdir()) <= 8  # as many files as come back
    assert proof.table(list(outcomes.values())).row_count == 6
    late = proof.prove(asked[-1:], tmp_path / "out", proof.LEAST / 2, workers=1)
    assert late[0].said == "not begun: the time was up"
    assert "FAILED" in capsys.readouterr().out


def test_probes_leave_their_verdicts(tmp_path, monkeypatch, capsys):
    """On a machine without a GPU they fail, one by one and with a reason."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setattr(probes, "PROBES", {"if_node": probes.if_node})
    report = tmp_path / "probes.json"
    assert probes.main(["--json", str(report)]) == 1
    outcome = parts.Outcome("probes", False, 1.0)
    parts.read_probes(report, outcome)
    assert outcome.counts == {"passed": 0, "failed": 1}
    assert "CUDA" in outcome.failures["if_node"] or "NVIDIA" in outcome.failures["if_node"]
    assert "FAILED if_node" in capsys.readouterr().out
    assert proof.main([]) == 2


def test_the_parts_fit_into_ten_minutes():
    asked = {p.name: p for p in parts.parts(Path("out"), ["--quick"])}
    assert list(asked) == ["probes", "kernels", "calls", "zoo", "bench"]
    assert sum(p.seconds for p in asked.values() if p.name != "bench") <= 600
    assert asked["bench"].command[-3:] == ["--out", "out/bench.json", "--quick"]


def test_what_must_be_carried(tmp_path, capsys):
    assert {"torch", "triton", "transformers", "networkx", "hypothesis", "cuda-bindings"} <= carry.needed()
    assert not carry.needed() & {"ruff", "mypy"}
    names = tmp_path / "names.txt"
    names.write_text("\n".join(sorted(carry.needed())).replace("pytest-xdist", "pytest_xdist"))
    assert carry.main(["--there", str(names), "--to", str(tmp_path / "wheels")]) == 0
    assert "nothing is missing" in capsys.readouterr().out
    assert carry.missing(carry.needed() - {"rich"}) == ["rich"]
    command = carry.download(["rich"], tmp_path, "3.12")
    assert command[-1].startswith("rich==")
    assert command[command.index("--python-version") + 1] == "3.12"
