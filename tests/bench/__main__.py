"""`python -m tests.bench`: runs the benchmarks, prints a table, and merges the figures into one JSON file."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from tests.bench import groups, machine, page, record

EPILOG = """examples:
  python -m tests.bench                     every group; CPU, 2 threads
  python -m tests.bench --only closed       one group; the others' figures stay in the file
  python -m tests.bench --device cuda       on a GPU, into results/cuda.json
  python -m tests.bench --show              the table of the file, nothing is run

groups:
"""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    listed = "\n".join(f"  {name:10s} {what}" for name, what in groups.GROUPS.items())
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench",
        description=__doc__,
        epilog=EPILOG + listed,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", action="append", choices=list(groups.GROUPS), help="run this group (may be repeated)")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--threads", type=int, default=2, help="threads that torch may use (2)")
    parser.add_argument("--rounds", type=int, default=9, help="interleaved rounds, at least 7 (9)")
    parser.add_argument("--out", type=Path, help="the JSON file (tests/bench/results/DEVICE.json)")
    parser.add_argument("--show", action="store_true", help="print the table of the file and stop")
    parser.add_argument("--page", action="store_true", help="write the file's table into docs/results.md and stop")
    parser.add_argument("--small", action="store_true", help=argparse.SUPPRESS)  # for tests/test_bench.py
    options = parser.parse_args(argv)
    if options.rounds < 7 and not options.small:
        parser.error(f"--rounds is {options.rounds}, wanted at least 7 for a median worth reporting")
    if options.device not in ("cpu", "cuda"):
        parser.error(f"--device is {options.device!r}, wanted cpu or cuda")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda, and torch sees no CUDA device")
    if options.small and options.out is None:
        parser.error("--small needs --out: its figures mean nothing and stay out of the results")
    options.out = options.out or record.RESULTS / f"{options.device}.json"
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    console = Console(width=None if sys.stdout.isatty() else 150)
    if options.show or options.page:
        if options.page and options.out.exists():
            made = page.markdown(record.read(options.out))
            page.PAGE.write_text(page.placed(page.PAGE.read_text(), made))
        return show(options.out, console)
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    context = groups.Context(device, options.rounds, small=options.small)
    for group in options.only or groups.GROUPS:
        console.print(f"{group}: {groups.GROUPS[group]} ...")
        start = time.perf_counter()
        figures = groups.run(group, context)
        made = {
            "command": f"python -m tests.bench --only {group}" + f" --device {options.device}" * (options.device != "cpu"),
            "about": groups.GROUPS[group],
            "date": time.strftime("%Y-%m-%d"),
            "seconds": round(time.perf_counter() - start, 1),
            "machine": machine.facts(device),
            "figures": [figure.to_dict() for figure in figures],
        }
        record.merge(options.out, group, made)
    return show(options.out, console)


def show(path: Path, console: Console) -> int:
    """The table; 2 where there is no file yet. A missed target is a finding, not a failure of the run."""
    if not path.exists():
        print(f"error: {path} is not there; run python -m tests.bench first", file=sys.stderr)
        return 2
    whole = record.read(path)
    console.print(record.table(whole))
    for sentence in record.misses(whole):
        console.print(f"missed: {sentence}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
