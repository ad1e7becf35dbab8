"""The tables and plots of figures on real data, made from ``results/*.json``, so that pages and records cannot drift apart.

``python -m examples.table`` writes all of them into docs/results.md and five into README.md, between the markers, and
docs/figures/NAME.svg; ``--check`` only compares and ends with 1 where a page or a plot differs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from examples import plots

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "examples" / "results"
FIGURES = ROOT / "docs" / "figures"
BEGIN, END = "<!-- figures: python -m examples.table -->", "<!-- end of figures -->"
COLUMNS = (
    "what",
    "thresholds",
    "trunk",
    "full",
    "early",
    "cost",
    "constant / random",
    "leaving",
    "faster at batch",
    "command",
)
SHORT_COLUMNS = ("", "strategy", "full", "early", "cost", "faster at 32", "command")
# The README's: one for each use, the last one a loss. Strategy, record, row.
SHORT = (
    ("`branchy`", "branchy_lenet", 0),
    ("`branchy`", "branchy_resnet", 0),
    ("`mebert`", "mebert_imdb", 0),
    ("`cascade`", "cascade_text", 0),
    ("`act`", "act_recurrent", 1),
)


def table(results: Path = RESULTS) -> str:
    """All rows of all records in Markdown; without records a sentence."""
    lines = [_line(row, record["command"]) for _, record in _records(results) for row in record["rows"]]
    return _markdown(COLUMNS, lines) if lines else "No result is recorded yet."


def drawn(results: Path = RESULTS) -> dict[str, list[dict[str, Any]]]:
    """What is plotted of each record, by its name; records that have no constant choices to compare with are left out."""
    smaller = plots.smaller_models(record for _, record in _records(results))
    found = {}
    for name, record in _records(results):
        *_, model = record.get("models", {"trunk": record.get("trunk")}).values()
        known = model is not None and "alone" not in record  # a cascade's own are among its constant choices
        found[name] = plots.panels(record, smaller.get(model["recipe"]["name"], ()) if known else ())
    return {name: panels for name, panels in found.items() if panels}


def page(results: Path = RESULTS) -> str:
    """`table`, and the plots below it."""
    shown = [f"![{name}: accuracy against cost](figures/{name}.svg)" for name in drawn(results)]
    return "\n\n".join([table(results), *shown])


def short(results: Path = RESULTS) -> str:
    """The rows of `SHORT` in Markdown."""
    lines = []
    for strategy, stem, index in SHORT:
        record = json.loads((results / f"{stem}.json").read_text())
        row = record["rows"][index]
        accuracies = (_percent(row.get("full_accuracy", row["original_accuracy"])), _percent(row["accuracy"]))
        ratio = row.get("speedup", {}).get("32")
        faster = "-" if ratio is None else f"{ratio:.2f}x"
        lines.append((row["what"], strategy, *accuracies, _percent(row["cost"]), faster, f"`{record['command']}`"))
    return _markdown(SHORT_COLUMNS, lines)


def _records(results: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for path in sorted(results.glob("*.json")):
        record = json.loads(path.read_text())
        if not path.stem.endswith("-quick") and "rows" in record:
            yield path.stem, record


def _markdown(columns: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
    head = f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}"
    return "\n".join((head, *(f"| {' | '.join(cells)} |" for cells in lines)))


def _line(row: dict[str, Any], command: str) -> tuple[str, ...]:
    accuracies = (_percent(row.get(key)) for key in ("original_accuracy", "full_accuracy", "accuracy"))
    shares = " / ".join(f"{100 * share:.0f}" for share in row.get("share", {}).values())
    times = "; ".join(
        _times(timed, where) for timed, where in ((row, ""), (row.get("onnx", {}), "as ONNX ")) if "speedup" in timed
    )
    leaving = f"{shares} %" if shares else "-"
    blind = " / ".join(_percent((row.get(key) or {}).get("accuracy")) for key in ("constant", "random"))
    first = (row["what"], row.get("thresholds", "-"), *accuracies, _percent(row.get("cost")), blind)
    return (*first, leaving, times or "-", f"`{command}`")


def _times(row: dict[str, Any], where: str) -> str:
    return where + ", ".join(f"{ratio:.2f}x at {size}" for size, ratio in row["speedup"].items())


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}%"


PAGES = {ROOT / "docs" / "results.md": page, ROOT / "README.md": short}


def placed(page: str, made: str) -> str:
    """``page`` with ``made`` between the markers."""
    before, found, rest = page.partition(BEGIN)
    _, closed, after = rest.partition(END)
    if not found or not closed:
        raise ValueError(f"the page has no '{BEGIN}' followed by '{END}'")
    return f"{before}{BEGIN}\n\n{made}\n\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.table", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; end with 1 where a page differs")
    only_check = parser.parse_args().check
    for path, make in PAGES.items():
        old = path.read_text()
        new = placed(old, make())
        if only_check and new != old:
            sys.exit(f"{path.name} differs from examples/results: run python -m examples.table")
        if not only_check:
            path.write_text(new)
    FIGURES.mkdir(exist_ok=True)
    for name, panels in drawn().items():
        path = FIGURES / f"{name}.svg"
        if only_check and not (path.exists() and plots.digest(panels) in path.read_text()):
            sys.exit(f"{path.name} differs from examples/results: run python -m examples.table")
        if not only_check:
            path.write_text(plots.svg(panels))


if __name__ == "__main__":
    main()
