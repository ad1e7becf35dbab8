"""The README's table of figures on real data, made from ``results/*.json``, so that the two cannot drift apart.

``python -m examples.table`` writes it between the markers in README.md; ``--check`` only compares and ends with 1
where they differ.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "examples" / "results"
BEGIN, END = "<!-- figures: python -m examples.table -->", "<!-- end of figures -->"
COLUMNS = ("what", "thresholds", "trunk", "full", "early", "cost", "leaving", "faster at batch", "command")


def table(results: Path = RESULTS) -> str:
    """The table in Markdown, a line for each row of each record; without records a sentence."""
    lines = []
    for path in sorted(results.glob("*.json")):
        record = json.loads(path.read_text())
        if path.stem.endswith("-quick") or "rows" not in record:
            continue
        lines += [_line(row, record["command"]) for row in record["rows"]]
    if not lines:
        return "No result is recorded yet."
    head = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}"
    return "\n".join((head, *lines))


def _line(row: dict[str, Any], command: str) -> str:
    accuracies = (_percent(row.get(key)) for key in ("original_accuracy", "full_accuracy", "accuracy"))
    shares = " / ".join(f"{100 * share:.0f}" for share in row.get("share", {}).values())
    times = ", ".join(f"{ratio:.2f}x at {size}" for size, ratio in row.get("speedup", {}).items())
    cells = (
        row["what"],
        row.get("thresholds", "-"),
        *accuracies,
        _percent(row.get("cost")),
        f"{shares} %" if shares else "-",
    )
    return f"| {' | '.join((*cells, times or '-', f'`{command}`'))} |"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}%"


def placed(readme: str, made: str) -> str:
    """``readme`` with ``made`` between the markers."""
    before, found, rest = readme.partition(BEGIN)
    _, closed, after = rest.partition(END)
    if not found or not closed:
        raise ValueError(f"README.md has no '{BEGIN}' followed by '{END}'")
    return f"{before}{BEGIN}\n\n{made}\n\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.table", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; end with 1 where README.md is behind")
    only_check = parser.parse_args().check
    path = ROOT / "README.md"
    old = path.read_text()
    new = placed(old, table())
    if only_check:
        sys.exit(None if new == old else "README.md is behind examples/results: run python -m examples.table")
    path.write_text(new)


if __name__ == "__main__":
    main()
