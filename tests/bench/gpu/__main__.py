"""`python -m tests.bench.gpu`: runs the GPU benchmark, part by part, prints a table, and merges the figures into JSON."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from tests.bench import record
from tests.bench.gpu import plan, table
from tests.bench.gpu.cases import Setting
from tests.bench.gpu.platform import Cuda, Host

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
TOLERANCES = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 6e-2}  # of answers, relative to the largest


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    listed = "\n".join(f"  {p.name:16s} {p.about} ({p.seconds:.0f} s)" for p in plan.PARTS)
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.gpu",
        description=__doc__,
        epilog=f"parts, in order, with the seconds expected:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", action="append", choices=list(plan.BY_NAME), help="run this part (may be repeated)")
    parser.add_argument("--quick", action="store_true", help="nodes, kernels, and BERT at 1 and 32")
    parser.add_argument("--seconds", type=float, default=560.0, help="no part is begun that would end after that (560)")
    parser.add_argument("--rounds", type=int, default=9, help="interleaved rounds, at least 7 (9)")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float16", help="of weights and images (float16)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: the driver alone, with --small")
    parser.add_argument("--out", type=Path, help="the JSON file (tests/bench/results/gpu-CARD.json)")
    parser.add_argument("--show", action="store_true", help="print the table of the file and stop")
    parser.add_argument("--readme", action="store_true", help="write the table of all cards into README.md and stop")
    parser.add_argument("--small", action="store_true", help=argparse.SUPPRESS)  # tiny models: figures mean nothing
    options = parser.parse_args(argv)
    if options.rounds < 7 and not options.small:
        parser.error(f"--rounds is {options.rounds}, wanted at least 7 for a median worth reporting")
    if options.small and options.out is None:
        parser.error("--small needs --out: its figures mean nothing and stay out of the results")
    if options.device == "cpu" and not options.small:
        parser.error("--device cpu runs the driver only, on tiny models: it needs --small")
    if options.readme or (options.show and options.out):
        return options
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device")
    options.out = options.out or record.RESULTS / f"gpu-{slug(torch.cuda.get_device_name())}.json"
    return options


def slug(card: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")


def main(argv: Sequence[str] | None = None) -> int:
    """0 where all was measured, 1 where something failed or was left out. A missed target is a finding, not a failure."""
    options = parse(argv)
    console = Console(width=None if sys.stdout.isatty() else 170)
    if options.readme:
        table.write(record.RESULTS)
        return 0
    if options.show:
        return show(options.out, console)
    dtype = DTYPES[options.dtype] if options.device == "cuda" else torch.float32
    platform = Cuda() if options.device == "cuda" else Host()
    setting = Setting(platform, options.rounds, TOLERANCES[dtype])
    asked = plan.Options(
        setting, options.out, options.seconds, dtype, options.small, lambda line: console.print(line, highlight=False)
    )
    parts = plan.chosen(options.only, options.quick)
    left_out = plan.run(parts, asked)
    shown = show(options.out, console)
    groups = record.read(options.out)["groups"] if options.out.exists() else {}
    problems = [problem for part in parts for problem in groups.get(part.name, {}).get("problems", [])]
    console.print(f"{len(problems)} problems; left out: {', '.join(left_out) or 'nothing'}", highlight=False)
    return 1 if shown or problems or left_out else 0


def show(path: Path, console: Console) -> int:
    if not path.exists():
        print(f"error: {path} is not there; run python -m tests.bench.gpu first", file=sys.stderr)
        return 2
    whole = record.read(path)
    console.print(table.table(whole))
    for line in table.targets(whole):
        console.print(line, highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
