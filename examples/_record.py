"""The command line of the examples, and the record that each prints and keeps as JSON."""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table

from eecompile.errors import EecompileError
from examples._registry import DatasetError, atomic
from examples.trunks import console

Phase = Literal["train", "evaluate", "measure"]
PHASES: tuple[Phase, ...] = ("train", "evaluate", "measure")
PACKAGES = ("torch", "transformers", "accelerate", "numpy", "safetensors")


# ---- the command line


@dataclass(frozen=True)
class Options:
    """What every example takes on its command line."""

    quick: bool = False
    seed: int = 0
    threads: int = 2
    out: Path = Path(__file__).parent / "results"
    until: Phase = "measure"
    json: bool = False


class Finished(Exception):
    """The phase that was asked for is done."""


def parse(doc: str | None, argv: Sequence[str] | None = None, name: str = "NAME") -> Options:
    """Options from the command line; sets the number of threads and the seed."""
    command = f"python -m examples.{name}"
    epilog = f"""examples:
  {command} --quick           in seconds, on stand-in data
  {command} --until train     train only; the next run goes on from there
  {command} --until evaluate  all but the times, for a machine that has other work
  {command}                   all that is not done yet; then evaluate, measure and write {name}.json
  {command} --json | jq .rows
"""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog=command, description=(doc or "").strip(), epilog=epilog, formatter_class=raw)
    parser.add_argument("--quick", action="store_true", help="stand-in data and small models, no network")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything that is random (0)")
    parser.add_argument("--threads", type=int, default=2, help="threads that torch may use (2)")
    parser.add_argument("--out", type=Path, default=Options.out, help="folder for NAME.json")
    parser.add_argument("--until", choices=PHASES, default="measure", help="stop after this phase")
    parser.add_argument("--json", action="store_true", help="the record as JSON on standard output")
    options = Options(**vars(parser.parse_args(argv)))
    if options.threads < 1:
        parser.error(f"--threads is {options.threads}, wanted at least 1")
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    return options


def main(name: str, doc: str | None, example: Callable[[Options, Record], None], argv: Sequence[str] | None = None) -> None:
    """Runs an example; ends the process with 0, with 2 on an error that has an explanation, 130 on Ctrl-C."""
    options = parse(doc, argv, name)
    record = Record(name, options)
    try:
        with redirect_stdout(sys.stderr):  # standard output is for the record
            example(options, record)
            path = record.write()
    except Finished as finished:
        console.print(f"{name}: {finished}")
        if options.until == "evaluate":
            record.note(timed=False)
            console.print(f"written, without times: {record.write()}")
        sys.exit(0)
    except (DatasetError, EecompileError) as problem:
        sys.exit(_told(f"error: {problem}"))
    except KeyboardInterrupt:
        _told(f"{name}: stopped; the same command goes on from the last checkpoint")
        sys.exit(130)
    if options.json:
        print(path.read_text(), end="")
    else:
        Console(width=None if sys.stdout.isatty() else 130).print(record)
        console.print(f"written: {path}")
    sys.exit(0)


def _told(text: str) -> int:
    print(text, file=sys.stderr)
    return 2


# ---- the record


@dataclass
class Record:
    """What one run found: facts by name, and the rows of its table.

    A row's figures, each where it has a meaning: ``thresholds`` (how they were chosen, in a word),
    ``original_accuracy`` (the trunk as trained without exits), ``full_accuracy`` (the compiled model with nothing
    left out), ``accuracy``, ``cost`` (mean share of the full model's FLOPs), ``constant`` and ``random`` (what is reached
    without looking at the rows, by the best constant choice and by chance at the same cost; ``constants`` are all of those
    that were tried, as name, cost and accuracy), ``share`` (by exit, the end
    last), ``speedup`` (by batch size, the original's time over the variant's).
    """

    name: str
    options: Options
    facts: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)

    def note(self, **facts: Any) -> None:
        """Facts of the whole run: data, model, training."""
        self.facts |= facts

    def row(self, what: str, **figures: Any) -> dict[str, Any]:
        """A line of the table; the dictionary that is returned may still be filled."""
        made = {"what": what, **figures}
        self.rows.append(made)
        return made

    def done(self, phase: Phase) -> None:
        """Ends the run where ``--until`` asked for no more than ``phase``."""
        if self.options.until == phase:
            raise Finished(f"done until {phase!r}; the same command without --until goes on from here")

    def to_dict(self) -> dict[str, Any]:
        options = self.options
        command = f"python -m examples.{self.name}" + " --quick" * options.quick
        command += f" --seed {options.seed}" if options.seed else ""
        command += f" --threads {options.threads}" if options.threads != Options.threads else ""
        machine = {
            "processor": torch.cpu.get_capabilities().get("cpu_name") or platform.machine(),
            "threads": options.threads,
            "python": platform.python_version(),
            "versions": {package: version(package) for package in PACKAGES},
        }
        run = {"seed": options.seed, "seconds": round(time.perf_counter() - self.started, 1)}
        return {"command": command, "machine": machine, **run, **self.facts, "rows": self.rows}

    def write(self) -> Path:
        """Keeps the record as ``NAME.json``, ``NAME-quick.json`` if quick."""
        return write_result(self.name, self.to_dict(), self.options)

    def __rich__(self) -> Table:
        sizes = sorted({size for row in self.rows for size in row.get("speedup", {})}, key=int)
        made = Table(title=f"{self.name}: test part, {self.options.threads} threads", title_justify="left")
        columns = ["what", "thresholds", "trunk", "full", "early", "cost", "constant", "random", "leaving at each exit"]
        for column in (*columns, *(f"x at {s}" for s in sizes)):
            made.add_column(column, justify="right" if column not in columns[:2] else "left", no_wrap=column == "what")
        for row in self.rows:
            shares = " ".join(f"{100 * share:.0f}" for share in row.get("share", {}).values())
            figures = [percent(row.get(key)) for key in ("original_accuracy", "full_accuracy", "accuracy", "cost")]
            figures += [percent((row.get(key) or {}).get("accuracy")) for key in ("constant", "random")]
            times = [f"{row['speedup'][s]:.2f}" if s in row.get("speedup", {}) else "-" for s in sizes]
            made.add_row(row["what"], row.get("thresholds", "-"), *figures, f"{shares} %" if shares else "-", *times)
        return made


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}%"


def write_result(name: str, result: dict[str, Any], options: Options) -> Path:
    """Keep ``result`` as ``NAME.json``, ``NAME-quick.json`` if quick."""
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{name}{'-quick' if options.quick else ''}.json"
    with atomic(path) as written:
        written.write_text(json.dumps(result, indent=2, default=str, allow_nan=False) + "\n")
    return path
