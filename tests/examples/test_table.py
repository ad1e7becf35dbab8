"""The figures on the pages are those of the recorded results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from examples import plots, table


@pytest.mark.parametrize("page", table.PAGES, ids=lambda page: page.name)
def test_pages_are_up_to_date(page: Path) -> None:
    text = page.read_text()
    assert table.placed(text, table.PAGES[page]()) == text, "run python -m examples.table"


@pytest.mark.parametrize(
    ("name", "panels"), table.drawn().items(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_plots_are_up_to_date(name: str, panels: list[dict[str, Any]]) -> None:
    found = (table.FIGURES / f"{name}.svg").read_text()
    assert plots.digest(panels) in found, "run python -m examples.table"


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
        assert one_thread or ("speedup" in row) == record.get("timed", True)
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


def test_plot_has_decisions_beside_choices_that_do_not_look_at_the_rows(tmp_path: Path) -> None:
    constants = [["exit_0", 0.2, 0.7], ["a name that is too long to write", 0.5, 0.8], ["model", 1.0, 0.9]]
    curve = [{"threshold": 0.5, "cost": 0.3, "accuracy": 0.8, "early": 0.9}]
    row = {"what": "it", "thresholds": "guaranteed", "accuracy": 0.88, "cost": 0.5, "constants": constants}
    rows = [{**row, "evaluation": {"curve": curve}}, {**row, "thresholds": "empirical"}, {"what": "other", "accuracy": 0.5}]
    small, large = ({"recipe": {"name": name}} for name in ("small", "large"))
    alone = {"models": {"s": small, "l": large}, "alone": [["s", 0.1, 0.6], ["l", 1.0, 0.9]], "rows": [{"what": "cascade"}]}
    for name, record in {"a": {"trunk": large, "rows": rows}, "b": alone}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"command": "c", **record}))
    drawn = table.drawn(tmp_path)
    assert list(drawn) == ["a"], "a record without constant choices has no plot"
    (panel,) = drawn["a"]
    assert panel["constants"] == [["exit_0", 0.2, 0.7], ["", 0.5, 0.8], ["model", 1.0, 0.9]]
    assert panel["chosen"] == [["guaranteed", 0.5, 0.88], ["empirical", 0.5, 0.88]]
    assert (panel["curve"], panel["static"]) == ([[0.3, 0.8]], [["s", 0.1, 0.6]])
    pytest.importorskip("matplotlib")
    svg = plots.svg(drawn["a"])
    assert svg == plots.svg(drawn["a"]), "the same figures give the same file"
    for said in ("guaranteed", "empirical", "same choice for all rows", "random choice", "smaller model", "exit_0"):
        assert f">{said}<" in svg
    assert plots.digest(drawn["a"]) in svg


def test_placed_replaces_only_what_is_between_the_markers() -> None:
    readme = f"# x\n{table.BEGIN}\nold\n{table.END}\nrest\n"
    new = table.placed(readme, "new")
    assert new == f"# x\n{table.BEGIN}\n\nnew\n\n{table.END}\nrest\n"
    assert table.placed(new, "new") == new
    with pytest.raises(ValueError, match="has no"):
        table.placed("# x", "new")
