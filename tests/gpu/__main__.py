"""`python -m tests.gpu`: mechanisms, tests and the benchmark of the device executor on a GPU, in under ten minutes.

A part that fails or hangs does not stop the others. `proof.json` is written after each part, with `log.txt` (all output),
`bench.json` (the benchmark's figures) and pytest's reports in the same folder.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as xml
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tests.kernels.test_interpreter import ON_GPU

ROOT = Path(__file__).parents[2]
LEAST = 20.0  # a part is not begun with less than this left
KEPT = 2000  # characters of a failure that the record keeps
PYTEST = ["-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", "-o", "filterwarnings=default"]
WORKERS = ["-n", str(min(12, max(1, (os.cpu_count() or 1) - 2)))]
PARTS: dict[str, tuple[list[str], float]] = {  # arguments of Python, and the most seconds that the part may take
    "mechanisms": ([*PYTEST, *WORKERS, "-m", "gpu", "tests/gpu/test_mechanisms_on_gpu.py"], 120),
    "kernels": ([*PYTEST, *WORKERS, "-o", "python_files=interpreted*.py", *ON_GPU], 150),
    "calls": ([*PYTEST, "-m", "gpu", "tests/gpu/test_calls_on_gpu.py", "tests/gpu/test_deadlines_on_gpu.py"], 120),
    "zoo": ([*PYTEST, *WORKERS, "-m", "gpu", "tests/gpu/test_zoo_on_gpu.py"], 210),
    "bench": (["-m", "tests.bench.gpu"], 600),
}


def main(argv: Sequence[str] | None = None) -> int:
    """0 where everything passed, 1 where something failed, 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__)
    parser.add_argument("--only", action="append", choices=list(PARTS), help="this part (may be repeated)")
    parser.add_argument("--seconds", type=float, default=570.0, help="of the whole (570)")
    parser.add_argument("--to", type=Path, default=Path("runs/gpu"), help="where results go (runs/gpu)")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("error: torch sees no CUDA device, and this proves what happens on one", file=sys.stderr)
        return 2
    asked = {name: PARTS[name] for name in options.only or PARTS}
    return 0 if all(p["ok"] for p in prove(asked, options.to, options.seconds)) else 1


def prove(asked: Mapping[str, tuple[Sequence[str], float]], to: Path, seconds: float) -> list[dict[str, Any]]:
    """Runs the parts one after the other and keeps the record."""
    to = to.resolve()
    to.mkdir(parents=True, exist_ok=True)
    began, found = time.perf_counter(), []
    for name, (arguments, most) in asked.items():
        left = seconds - (time.perf_counter() - began)
        if left < LEAST:
            found.append({"name": name, "ok": False, "seconds": 0.0, "said": "not begun: the time was up"})
        else:
            found.append(run(name, arguments, min(most, left), to))
        verdict = {k: v for k, v in found[-1].items() if k not in ("name", "ok", "failures")}
        print(f"{name}: {'ok' if found[-1]['ok'] else 'FAILED'} {verdict}", flush=True)
        for case, why in list(found[-1].get("failures", {}).items())[:5]:
            print(f"  {case}: {why[-600:]}", flush=True)
        save(to / "proof.json", found)
    return found


def run(name: str, arguments: Sequence[str], seconds: float, to: Path) -> dict[str, Any]:
    """Runs a part, its output into the log. Nothing that goes wrong in it is raised."""
    command, report = [sys.executable, *arguments], to / f"{name}.xml"
    if "pytest" in arguments:
        report.unlink(missing_ok=True)
        command.append(f"--junitxml={report}")
    if name == "bench":
        command += ["--out", str(to / f"{name}.json"), "--seconds", f"{seconds - 10:.0f}"]
    own = {"PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    began = time.perf_counter()
    with (to / "log.txt").open("ab+") as log:
        log.write(f"\n==== {name}: {' '.join(command)}\n".encode())
        log.flush()
        start = log.tell()
        child = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | own, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code: int | None = child.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, 9)  # its workers too: they hold the GPU
            child.wait()
            code = None
        log.seek(start)
        tail = log.read().decode(errors="replace")[-KEPT:]
    said = f"stopped after {seconds:.0f} s" if code is None else f"exit code {code}"
    found: dict[str, Any] = {"name": name, "ok": code == 0, "seconds": round(time.perf_counter() - began, 1), "said": said}
    if "pytest" in arguments:
        found |= read_pytest(report)
        found["ok"] = found["ok"] and found["passed"] > 0  # a run of no test at all proves nothing
    if not found["ok"] and not found.get("failures"):
        found["failures"] = {"the end of its output": tail}
    return found


def read_pytest(report: Path) -> dict[str, Any]:
    """Counts and failures of pytest's own report."""
    found: dict[str, Any] = {"passed": 0, "failed": 0, "skipped": 0, "failures": {}}
    for case in xml.parse(report).getroot().iter("testcase") if report.exists() else ():
        bad = [e for tag in ("failure", "error") for e in case.iter(tag)]
        found["failed" if bad else "skipped" if case.find("skipped") is not None else "passed"] += 1
        if bad:
            name = f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
            found["failures"][name] = (bad[0].text or bad[0].get("message") or "")[-KEPT:]
    return found


def save(path: Path, found: Sequence[Mapping[str, Any]]) -> None:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    whole = {"date": time.strftime("%Y-%m-%d"), "device": device, "torch": torch.__version__, "parts": list(found)}
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps(whole, indent=2) + "\n")
    fresh.replace(path)


if __name__ == "__main__":
    sys.exit(main())
