"""`python -m tests.bench.gpu`: the device executor against its rivals on a GPU, part by part, as a table and JSON."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from tests.bench import machine, record
from tests.bench.gpu import cases, kernels, subjects
from tests.bench.gpu.cases import Found, Setting
from tests.bench.gpu.platform import Cuda, Host

PARTS: dict[str, tuple[str, int]] = {  # in order of what matters most: a model and a batch size
    "kernels": ("", 0),
    "bert-1": ("bert", 1),
    "bert-32": ("bert", 32),
    "resnet-1": ("resnet", 1),
    "resnet-32": ("resnet", 32),
    "bert-128": ("bert", 128),
}
LONGEST = 60.0  # seconds: no part is begun with less left


def main(argv: Sequence[str] | None = None) -> int:
    """0 where all was measured, 1 where something failed or was left out. A missed target is a finding, not a failure."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.gpu", description=__doc__)
    parser.add_argument("--only", action="append", choices=list(PARTS), help="run this part (may be repeated)")
    parser.add_argument("--seconds", type=float, default=560.0, help="no part is begun in the last minute of that (560)")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu/bench.json"), help="the JSON file (runs/gpu/bench.json)")
    parser.add_argument("--small", action="store_true", help=argparse.SUPPRESS)  # tiny models on the CPU: the driver alone
    options = parser.parse_args(argv)
    if not options.small and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device")
    setting = Setting(Host(), rounds=2, check=1e-3) if options.small else Setting(Cuda())
    left_out, problems = run(options.only or list(PARTS), setting, options.out, options.seconds, options.small)
    console = Console(width=None if sys.stdout.isatty() else 170)
    if options.out.exists():
        console.print(record.table(record.read(options.out)))
    for problem in problems:
        console.print(f"problem: {problem}", markup=False, highlight=False)
    console.print(f"left out: {', '.join(left_out) or 'nothing'}", highlight=False)
    return 1 if problems or left_out else 0


def run(parts: Sequence[str], setting: Setting, out: Path, seconds: float, small: bool) -> tuple[list[str], list[str]]:
    """Runs what there is time for; gives the names of what was left out, and what went wrong."""
    began, left_out, problems = time.perf_counter(), [], []
    made: dict[str, subjects.Subject] = {}
    for name in parts:
        model, batch = PARTS[name]
        if time.perf_counter() - began > seconds - LONGEST and not small:
            left_out.append(name)
            continue
        started = time.perf_counter()

        def save(found: Found, name: str = name, started: float = started) -> None:
            record.merge(out, name, part(name, found, time.perf_counter() - started, setting))

        found = Found(save)
        with found.trying(name):
            if name == "kernels":
                kernels.run(setting, found, small)
            else:
                if model not in made:
                    made[model] = subjects.made(model, setting.platform.device, small, setting.platform.dtype)
                cases.run(made[model], batch, setting, found)
        save(found)
        problems += found.problems
        print(f"{name}: {time.perf_counter() - started:.1f} s, {len(found.figures)} figures", flush=True)
    return left_out, problems


def part(name: str, found: Found, seconds: float, setting: Setting) -> dict[str, Any]:
    """The record of one part, in the form of the other benchmarks' with its problems."""
    return {
        "command": f"python -m tests.bench.gpu --only {name}",
        "about": "the device executor",
        "date": time.strftime("%Y-%m-%d"),
        "seconds": round(seconds, 1),
        "machine": machine.facts(setting.platform.device),
        "problems": found.problems,
        "figures": [f.to_dict() for f in found.figures],
    }


if __name__ == "__main__":
    sys.exit(main())
