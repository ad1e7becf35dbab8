"""The GPU proof without a GPU: its tests are collected, its mechanisms and helpers hold, its command keeps a record."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.bench.gpu.platform import Host
from tests.gpu import __main__ as proof
from tests.gpu import test_mechanisms_on_gpu as mechanisms
from tests.gpu.test_zoo_on_gpu import agree, check, compiled, inputs, run, wide

pytestmark = pytest.mark.nightly  # tests of a harness

ROOT = Path(__file__).parents[1]
ON_HOST = [
    mechanisms.test_if_node,
    mechanisms.test_nested_ifs,
    mechanisms.test_switch_node,
    mechanisms.test_while_node,
    mechanisms.test_a_model_in_a_body,
    mechanisms.test_replays_queue_without_the_host,
]


def test_every_test_for_a_gpu_is_collected():
    """Without an error, and none of them by `make test`."""
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", "tests/gpu", "-m", "gpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    found = [line for line in done.stdout.splitlines() if "::" in line]
    assert len(found) > 100
    for name in ("synchronises_nothing", "no_copy_to_the_host", "returns_at_once", "ten_thousand", "error_inside_a_body"):
        assert any(name in line for line in found), name
    assert "deselected" not in done.stdout, "tests/gpu has tests that are not marked"


@pytest.mark.parametrize("mechanism", ON_HOST)
def test_mechanisms_of_graphs_hold_on_the_host(mechanism):
    with torch.no_grad():
        mechanism(Host())


def test_the_zoo_check_with_the_simulator_and_that_it_can_fail():
    check("bert", torch.bfloat16, "cpu", "simulate", structures=("nested",), batches=(7,))
    fast = compiled("lenet", device="cpu")
    args, kwargs = inputs("lenet", 7, "cpu")
    confidences = fast.observe(*args, **kwargs).confidences[:-1]
    thresholds = wide(confidences, random.Random(0))
    fast.set_thresholds(thresholds)
    good = run(fast, "simulate", args, kwargs)
    agree(fast, good, run(fast, "reference", args, kwargs), confidences, thresholds)
    with pytest.raises(AssertionError, match=r"\d, \d"):
        agree(fast, replace(good, exit_index=good.exit_index + 1), good, confidences, thresholds)
    with pytest.raises(AssertionError, match="not close"):
        agree(fast, replace(good, output=good.output + 1), good, confidences, thresholds)


TESTS = "import pytest\ndef test_c(): assert 1 == 2\ndef test_d(): pytest.skip('x')\ndef test_e(): pass\n"


def test_the_proof_goes_on_after_failures_and_keeps_a_record(tmp_path, capsys):
    some, none = tmp_path / "test_some.py", tmp_path / "test_none.py"
    some.write_text(TESTS)
    none.write_text("")
    pytest_of = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", "/dev/null", "--rootdir", str(tmp_path)]
    asked = {
        "good": ([*pytest_of, f"{some}::test_e"], 60),
        "bad": ([*pytest_of, str(some)], 60),
        "none": ([*pytest_of, str(none)], 60),
        "hangs": (["-c", "print('here', flush=True); import time; time.sleep(60)"], 2),
        "breaks": (["-c", "raise SystemExit('no such GPU')"], 60),
        "passes": (["-c", "pass"], 60),
    }
    found = {p["name"]: p for p in proof.prove(asked, tmp_path / "out", 300)}
    assert [name for name, p in found.items() if p["ok"]] == ["good", "passes"]
    assert [found["bad"][k] for k in ("passed", "failed", "skipped")] == [1, 1, 1]
    assert "assert 1 == 2" in found["bad"]["failures"]["test_some::test_c"]
    assert found["hangs"]["said"] == "stopped after 2 s"
    assert "here" in found["hangs"]["failures"]["the end of its output"]
    assert "no such GPU" in found["breaks"]["failures"]["the end of its output"]
    written = json.loads((tmp_path / "out" / "proof.json").read_text())
    assert [p["name"] for p in written["parts"]] == list(asked)
    assert "no such GPU" in (tmp_path / "out" / "log.txt").read_text()
    late = proof.prove({"passes": asked["passes"]}, tmp_path / "out", proof.LEAST / 2)
    assert late[0]["said"] == "not begun: the time was up"
    assert "FAILED" in capsys.readouterr().out
    assert sum(seconds for _, seconds in list(proof.PARTS.values())[:-1]) <= 600


def test_without_a_gpu_there_is_no_proof(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert proof.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().err
