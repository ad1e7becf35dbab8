"""The parts of the GPU proof: what each runs, for how long at most, and what its outcome says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as xml
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.kernels.test_interpreter import FILES

ROOT = Path(__file__).parents[2]
PYTEST = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", "-o", "filterwarnings=default"]
KERNELS = ["-p", "tests.gpu.carried", "-o", "python_files=interpreted*.py", *FILES]
CALLS = ["-m", "gpu", "tests/gpu/test_calls_on_gpu.py", "tests/gpu/test_deadlines_on_gpu.py"]
ZOO = ["-m", "gpu", "tests/gpu/test_zoo_on_gpu.py"]
KEPT = 2000  # characters of a failure that the record keeps
SHOWN = 40  # failures that it keeps


@dataclass(frozen=True)
class Part:
    """One command.

    Attributes:
        seconds: It is stopped after that, or when the time of the whole runs out.
        kind: How its outcome is read: "probes" and "pytest" leave a file, "command" has an exit code only.
    """

    name: str
    about: str
    command: Sequence[str]
    seconds: float
    kind: str = "command"
    parallel: bool = False


@dataclass
class Outcome:
    """What became of a part. `counts` are of tests or probes, by outcome."""

    name: str
    ok: bool
    seconds: float
    said: str = ""
    counts: dict[str, int] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {**self.__dict__, "seconds": round(self.seconds, 1)}


def parts(to: Path, bench: Sequence[str]) -> list[Part]:
    """All parts in order. `bench` are arguments for the benchmark, which takes whatever time is left."""
    return [
        Part("probes", "mechanisms, one by one", [sys.executable, "-m", "tests.gpu.probes"], 120, "probes"),
        Part("kernels", "every kernel against its float64 definition", [*PYTEST, *KERNELS], 150, "pytest", True),
        Part("calls", "no synchronisation, queued replays, 10,000 calls, errors", [*PYTEST, *CALLS], 120, "pytest"),
        Part("zoo", "every model, device against reference, three precisions", [*PYTEST, *ZOO], 210, "pytest", True),
        Part(
            "bench",
            "the device executor against its rivals",
            [sys.executable, "-m", "tests.bench.gpu", "--out", str(to / "bench.json"), *bench],
            3600,
        ),
    ]


def run(part: Part, seconds: float, log: Path, to: Path, workers: int) -> Outcome:
    """Runs a part, its output into `log`. Nothing that goes wrong in it is raised."""
    command, report = list(part.command), to / f"{part.name}.xml"
    if part.kind == "pytest":
        command += [f"--junitxml={report}", *(["-n", str(workers)] if part.parallel and workers > 1 else [])]
    if part.kind == "probes":
        command += ["--json", str(to / "probes.json")]
    if part.name == "bench":
        command += ["--seconds", f"{seconds - 10:.0f}"]
    environment = {
        **os.environ,
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    began, limit = time.perf_counter(), min(part.seconds, seconds)
    with log.open("ab") as file:
        file.write(f"\n==== {part.name}: {' '.join(command)}\n".encode())
        file.flush()
        start = file.tell()
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code: int | None = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)  # its workers too: they hold the GPU
            process.wait()
            code = None
    took, tail = time.perf_counter() - began, output_since(log, start)[-KEPT:]
    said = f"stopped after {limit:.0f} s" if code is None else "" if code == 0 else f"exit code {code}"
    outcome = Outcome(part.name, code == 0, took, said)
    if part.kind == "pytest":
        read_pytest(report, outcome)
    if part.kind == "probes":
        read_probes(to / "probes.json", outcome)
    if not outcome.ok and not outcome.failures:
        outcome.failures["the end of its output"] = tail
    return outcome


def output_since(log: Path, start: int) -> str:
    with log.open("rb") as file:
        file.seek(start)
        return file.read().decode(errors="replace")


def read_probes(report: Path, outcome: Outcome) -> None:
    """Verdicts of the probes; what they said stays in their own file."""
    if not report.exists():
        outcome.ok, outcome.said = False, outcome.said or "no report"
        return
    verdicts = json.loads(report.read_text())
    outcome.failures = {name: str(v["said"])[-KEPT:] for name, v in verdicts.items() if not v["ok"]}
    outcome.counts = {"passed": len(verdicts) - len(outcome.failures), "failed": len(outcome.failures)}


def read_pytest(report: Path, outcome: Outcome) -> None:
    """Counts and failures of pytest's own report; a run of no test at all proves nothing."""
    if not report.exists():
        outcome.ok, outcome.said = False, outcome.said or "no report"
        return
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    for case in xml.parse(report).getroot().iter("testcase"):
        bad = [e for tag in ("failure", "error") for e in case.iter(tag)]
        kind = "failed" if bad else "skipped" if case.find("skipped") is not None else "passed"
        counts[kind] += 1
        if bad and len(outcome.failures) < SHOWN:
            name = f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
            outcome.failures[name] = (bad[0].text or bad[0].get("message") or "")[-KEPT:]
    report.unlink()  # the record has it
    outcome.counts = counts
    if not counts["passed"]:
        outcome.ok, outcome.said = False, outcome.said or "no test passed"
