"""The record as a table: for the terminal, and for the README."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from tests.bench.gpu.plan import BY_NAME
from tests.bench.readme import README, VERDICTS
from tests.bench.readme import placed as between

BEGIN, END = "<!-- gpu benchmarks: python -m tests.bench.gpu --readme -->", "<!-- end of gpu benchmarks -->"
NOT_RUN = "**None of this has run on a GPU yet:** there are no figures."


def in_order(whole: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    order = {name: i for i, name in enumerate(BY_NAME)}
    return sorted(whole["groups"].items(), key=lambda item: order.get(item[0], len(order)))


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def table(whole: dict[str, Any]) -> Table:
    made = Table(title="device executor: interleaved in one run, median; predicted before any run", title_justify="left")
    for name in ("part", "what"):
        made.add_column(name)
    for name in ("figure", "spread", "predicted", "target"):
        made.add_column(name, justify="right")
    made.add_column("")
    verdicts = {True: "[green]met[/green]", False: "[red]missed[/red]", None: ""}
    for part, result in in_order(whole):
        for f in result["figures"]:
            cells = (f"{number(f['value'])} {f['unit']}", number(f["spread"]), number(f["predicted"]), f["target"] or "-")
            made.add_row(part, f["name"], *cells, verdicts[f["met"]])
        for problem in result["problems"]:
            made.add_row(part, f"[red]problem:[/red] {problem[:200]}".replace("[/]", ""), "", "", "", "", "")
        made.add_section()
    return made


def targets(whole: dict[str, Any]) -> list[str]:
    """A line for each figure that has a target."""
    return [
        f"{'met' if f['met'] else 'MISSED'}: {f['name']}: {number(f['value'])} {f['unit']}, wanted {f['target']}, "
        f"predicted {number(f['predicted'])}"
        for _, result in in_order(whole)
        for f in result["figures"]
        if f["target"] is not None
    ]


def markdown(wholes: list[dict[str, Any]]) -> str:
    """The README's table, of one file for each card; a sentence where nothing has run."""
    lines = [line for whole in wholes for line in _markdown(whole)]
    return "\n".join(lines) if lines else NOT_RUN


def _markdown(whole: dict[str, Any]) -> list[str]:
    lines = ["| | figure | spread | predicted | target | | command |", "|---|---|---|---|---|---|---|"]
    notes, machines = [], set()
    for part, result in in_order(whole):
        m = result["machine"]
        machines.add(f"Measured on {m['device']}, {m['dtype']}, torch {m['versions']['torch']}.")
        for f in result["figures"]:
            cells = (
                f["name"], f"{number(f['value'])} {f['unit']}", number(f["spread"]), number(f["predicted"]),
                f["target"] or "", VERDICTS[f["met"]], f"`--only {part}`",
            )  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
        notes += [f"- Not measured: {problem}" for problem in result["problems"]]
    return [*lines, "", *([*notes, ""] if notes else []), *sorted(machines), ""]


def placed(readme: str, made: str) -> str:
    """`readme` with `made` between the markers of the GPU's figures."""
    return between(readme, made, BEGIN, END)


def write(results: Path, readme: Path = README) -> None:
    from tests.bench.record import read

    wholes = [read(path) for path in sorted(results.glob("gpu-*.json"))]
    readme.write_text(placed(readme.read_text(), markdown(wholes)))
