"""The page: self-contained, true to the data, and honest where early exit does not pay."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from eecompile import CompiledModule, EecompileError
from eecompile.report import KINDS, plot, report
from eecompile.report.gather import frontier, gather

pytest.importorskip("matplotlib")

Data = list[tuple[Tensor, Tensor]]


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href") and not v.startswith("#")]


def test_page_stands_alone(fast: CompiledModule, data: Data, tmp_path: Path) -> None:
    written = report(fast, tmp_path / "report.html", data)
    text = written.read_text(encoding="utf-8")
    tags = Tags()
    tags.feed(text)
    assert tags.links == [] and "script" not in tags.tags
    assert text.count("<figcaption>") == len(KINDS)
    evaluated = fast.evaluate(data)
    assert f"{evaluated.accuracy:.2%}" in text and f"{evaluated.mean_cost:.1%}" in text
    for row in evaluated.rows:
        assert f"<td>{row.name}</td>" in text
    assert list(tmp_path.iterdir()) == [written], "nothing half-written stays"


def test_what_is_gathered_is_what_runs(fast: CompiledModule, data: Data) -> None:
    found = gather(fast, data)
    x, y = torch.cat([b[0] for b in data]), torch.cat([b[1] for b in data])
    run = fast.run(x)
    assert torch.equal(found.index, run.exit_index)
    assert torch.equal(found.right.gather(1, found.index[:, None])[:, 0], run.output.argmax(1) == y)
    for e in (*found.early_right, *found.early_wrong):
        assert (e.label, e.prediction, e.exit) == (
            int(y[e.row]),
            int(run.output[e.row].argmax()),
            found.names[found.index[e.row]],
        )
    assert {e.label == e.prediction for e in found.early_right} <= {True}
    assert sum(map(len, found.seconds.values())) == 40 and len(found.original_seconds or []) == 40


@pytest.mark.parametrize("kind", KINDS)
def test_plots(fast: CompiledModule, data: Data, kind: str) -> None:
    (axes,) = plot(fast, kind, data).axes
    assert axes.get_ylabel() and axes.has_data()


def test_page_says_first_where_early_exit_does_not_pay(fast: CompiledModule, data: Data, tmp_path: Path) -> None:
    fast.set_thresholds(2.0)
    try:
        text = report(fast, tmp_path / "closed.html", data).read_text(encoding="utf-8")
    finally:
        fast.set_thresholds([0.36, 0.36])
    first = re.search(r'<p class="verdict( loss)?">([^<]*)', text)
    assert first is not None and first.group(1) and first.group(2).startswith("Early exit does not pay here")


def test_frontier_is_the_best_mixture() -> None:
    points = [(0.2, 0.5), (0.5, 0.9), (1.0, 1.0)]
    assert frontier(points, 0.1) is None
    assert frontier(points, 0.2) == 0.5
    assert frontier(points, 0.35) == pytest.approx(0.7)
    assert frontier(points, 2.0) == 1.0


def test_bad_calls(fast: CompiledModule, data: Data, tmp_path: Path) -> None:
    with pytest.raises(EecompileError, match="unknown plot"):
        plot(fast, "pie", data)
    with pytest.raises(EecompileError, match="cannot be written"):
        report(fast, tmp_path / "nowhere" / "r.html", data)
    with pytest.raises(EecompileError, match="label"):
        report(fast, tmp_path / "r.html", [data[0][0]])
    assert list(tmp_path.iterdir()) == []
