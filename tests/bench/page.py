"""The table of benchmark figures in docs/results.md, made from `results/cpu.json`, so that the two cannot drift apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "docs" / "results.md"
BEGIN, END = "<!-- benchmarks: python -m tests.bench --page -->", "<!-- end of benchmarks -->"
VERDICTS = {True: "met", False: "**missed**", None: ""}


def markdown(whole: dict[str, Any]) -> str:
    """A table of all figures, the machines they were made on, and a line for each missed target."""
    lines = ["| | figure | spread | target | | command |", "|---|---|---|---|---|---|"]
    notes = []
    for group, result in whole["groups"].items():
        for f in result["figures"]:
            verdict = VERDICTS[f["met"]] + (" (disturbed)" if f["disturbed"] else "")
            spread = f"{f['spread']:.3f}" if f["rounds"] > 1 else ""
            cells = (f"{f['name']}: {result['about']}", f"{f['value']:.3f} {f['unit']}", spread, f["target"] or "", verdict)
            lines.append(f"| {' | '.join(cells)} | `--only {group}` |")
            if f["met"] is False:
                notes.append(f"- Missed: {f['name']}. {f['cause'] or 'Cause unknown.'}")
    return "\n".join([*lines, *([""] if notes else []), *notes, "", *sorted(_machines(whole))])


def _machines(whole: dict[str, Any]) -> set[str]:
    return {
        f"Measured on {m['processor']}, {m['threads']} threads, {m['isa']}, torch {m['versions']['torch']}."
        for m in (result["machine"] for result in whole["groups"].values())
    }


def placed(page: str, made: str, begin: str = BEGIN, end: str = END) -> str:
    """`page` with `made` between the markers.

    Raises:
        ValueError: The markers are not there.
    """
    before, found, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"the page has no '{begin}' followed by '{end}'")
    return f"{before}{begin}\n\n{made.rstrip()}\n\n{end}{after}"
