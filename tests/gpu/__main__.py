"""`python -m tests.gpu`: probes, tests and the benchmark of the device executor on a GPU, in under ten minutes.

A part that fails or hangs does not stop the others. `proof.json` is written after each part, beside `log.txt` with all
output and `bench.json` with the benchmark's figures, so that a command that is killed has left what it found.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from tests.gpu.parts import Outcome, Part, parts, run

LEAST = 20.0  # a part is not begun with less than this left
NAMES = [part.name for part in parts(Path(), [])]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__)
    parser.add_argument("--only", action="append", choices=NAMES, help="this part (may be repeated)")
    parser.add_argument("--seconds", type=float, default=570.0, help="of the whole (570)")
    parser.add_argument("--to", type=Path, default=Path(os.environ.get("OUT", "runs/gpu")), help="where results go ($OUT)")
    parser.add_argument("--workers", type=int, default=min(12, max(1, (os.cpu_count() or 1) - 2)), help="for tests")
    parser.add_argument("--quick", action="store_true", help="the quick parts of the benchmark")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """0 where everything passed, 1 where something failed, 2 without a GPU."""
    options = parse(argv)
    if not torch.cuda.is_available():
        print("error: torch sees no CUDA device, and this proves what happens on one", file=sys.stderr)
        return 2
    asked = [
        p for p in parts(options.to, ["--quick"] if options.quick else []) if not options.only or p.name in options.only
    ]
    outcomes = prove(asked, options.to, options.seconds, options.workers)
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(table(outcomes))
    for outcome in outcomes:
        for name, why in list(outcome.failures.items())[:5]:
            console.print(f"{outcome.name}: {name}\n{why[-600:]}\n", markup=False, highlight=False)
    return 0 if all(outcome.ok for outcome in outcomes) else 1


def prove(asked: Sequence[Part], to: Path, seconds: float, workers: int) -> list[Outcome]:
    """Runs the parts one after the other and keeps the record."""
    to.mkdir(parents=True, exist_ok=True)
    began, outcomes = time.perf_counter(), []
    for part in asked:
        left = seconds - (time.perf_counter() - began)
        print(f"{part.name}: {part.about}; {left:.0f} s left", flush=True)
        if left < LEAST:
            outcomes.append(Outcome(part.name, False, 0.0, "not begun: the time was up"))
        else:
            outcomes.append(run(part, left, to / "log.txt", to, workers))
        print(
            f"  {'ok' if outcomes[-1].ok else 'FAILED'} after {outcomes[-1].seconds:.0f} s {outcomes[-1].counts}", flush=True
        )
        save(to / "proof.json", outcomes)
    return outcomes


def save(path: Path, outcomes: Sequence[Outcome]) -> None:
    cuda = torch.cuda.is_available()
    whole = {
        "command": "python -m tests.gpu",
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name() if cuda else "none",
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "parts": [outcome.to_dict() for outcome in outcomes],
    }
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps(whole, indent=2) + "\n")
    fresh.replace(path)


def table(outcomes: Sequence[Outcome]) -> Table:
    made = Table(title="device executor on this GPU", title_justify="left")
    for name in ("part", "", "passed", "failed", "skipped", "seconds", ""):
        made.add_column(name)
    for o in outcomes:
        counts = [str(o.counts.get(k, "")) for k in ("passed", "failed", "skipped")]
        verdict = "[green]ok[/green]" if o.ok else "[red]FAILED[/red]"
        made.add_row(o.name, verdict, *counts, f"{o.seconds:.0f}", o.said)
    return made


if __name__ == "__main__":
    sys.exit(main())
