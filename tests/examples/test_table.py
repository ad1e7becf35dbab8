"""The figures on the pages are those of the recorded results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from examples import table


@pytest.mark.parametrize("page", table.PAGES, ids=lambda page: page.name)
def test_pages_are_up_to_date(page: Path) -> None:
    text = page.read_text()
    assert table.placed(text, table.PAGES[page]()) == text, "run python -m examples.table"


@pytest.mark.parametrize("path", sorted(table.RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_results_are_whole(path: Path) -> None:
    """Made by the command they name, on real data, with everything that a reader needs to judge them."""
    record = json.loads(path.read_text())
    assert record["command"] in (f"python -m examples.{path.stem}", f"python -m examples.{path.stem} --threads 1")
    assert record["machine"]["versions"]["torch"]
    one_thread = "sweep" in record  # a sweep over deadlines, one image at a time
    assert record["machine"]["threads"] in ((1, 2) if one_thread else (1,) if "--threads 1" in record["command"] else (2,))
    for row in record["rows"]:
        assert 0 < row["accuracy"] <= 1
        assert one_thread or row["speedup"]
        if "share" in row and set(row["share"]) <= {"model", *(f"exit_{k}" for k in range(100))}:
            assert sum(row["share"].values()) == pytest.approx(1)


def test_table_shows_what_is_in_a_record(tmp_path: Path) -> None:
    row = {"what": "it", "thresholds": "guaranteed", "original_accuracy": 0.9912, "accuracy": 0.985, "cost": 0.15}
    row |= {"constant": {"what": "exit_0", "cost": 0.14, "accuracy": 0.85}, "random": None}
    row |= {"share": {"exit_0": 0.98, "model": 0.02}, "speedup": {"1": 1.239, "32": 3.5}}
    (tmp_path / "a.json").write_text(json.dumps({"command": "python -m examples.a", "rows": [row]}))
    (tmp_path / "a-quick.json").write_text(json.dumps({"command": "python -m examples.a --quick", "rows": [row]}))
    line = table.table(tmp_path).splitlines()[-1]
    wanted = ("it", "guaranteed", "99.1%", "-", "98.5%", "15.0%", "85.0% / -", "98 / 2 %", "1.24x at 1, 3.50x at 32")
    assert line == f"| {' | '.join(wanted)} | `python -m examples.a` |"
    assert len(table.table(tmp_path).splitlines()) == 3


def test_placed_replaces_only_what_is_between_the_markers() -> None:
    readme = f"# x\n{table.BEGIN}\nold\n{table.END}\nrest\n"
    new = table.placed(readme, "new")
    assert new == f"# x\n{table.BEGIN}\n\nnew\n\n{table.END}\nrest\n"
    assert table.placed(new, "new") == new
    with pytest.raises(ValueError, match="has no"):
        table.placed("# x", "new")
