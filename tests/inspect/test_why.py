"""`where`: why each row left where it did."""

from __future__ import annotations

import json

import pytest
import torch

from eecompile import CompiledModule
from eecompile.inspect import where
from tests.inspect.conftest import images, tokens


@pytest.fixture
def spread(conv: CompiledModule) -> CompiledModule:
    """Thresholds at the medians of the rows that are still in, so that some leave at each; the middle exit closed."""
    before = conv.thresholds.tolist()
    seen = conv.observe(images(12)).confidences
    assert seen is not None
    first = float(seen[0].median()) + 1e-6
    third = float(seen[2][seen[0] < first].median()) + 1e-6
    conv.set_thresholds([first, 2.0, third])
    yield conv  # type: ignore[misc]
    conv.set_thresholds(before)


def test_it_agrees_with_what_runs(spread: CompiledModule) -> None:
    x = images(12)
    result = spread.run(x)
    found = where(spread, x)
    names = [e.name for e in spread.exits] + ["model"]
    assert [r.left_at for r in found.rows] == [names[i] for i in result.exit_index.tolist()]
    assert [r.prediction for r in found.rows] == result.output.argmax(-1).tolist()
    assert [r.cost for r in found.rows] == pytest.approx(result.cost.tolist())
    assert [r.full_prediction for r in found.rows] == spread.full(x).argmax(-1).tolist()
    assert {r.left_at for r in found.rows} == {"exit_0", "exit_2", "model"}


def test_every_row_left_at_the_first_exit_that_was_sure(spread: CompiledModule) -> None:
    for r in where(spread, images(12)).rows:
        assert next(a.exit for a in r.exits if a.sure) == r.left_at
        closed = r.exits[1]
        assert not closed.open
        assert not closed.sure
        for a in r.exits[:-1]:
            assert a.threshold is not None
            assert a.sure == (a.open and a.confidence >= a.threshold)


def test_the_sentence_gives_the_numbers(spread: CompiledModule) -> None:
    for r in where(spread, images(12)).rows:
        first, _, third, _ = r.exits
        if r.left_at == "exit_0":
            assert r.why == f"exit_0 is the first that is sure: {first.confidence:.3f} >= {first.threshold:.3f}"
        else:
            assert f"exit_0 {first.confidence:.3f} < {first.threshold:.3f}" in r.why
        if r.left_at == "model":
            assert f"exit_2 {third.confidence:.3f} < {third.threshold:.3f}" in r.why
        assert "exit_1" not in r.why  # it is closed


def test_all_closed(conv: CompiledModule) -> None:
    before = conv.thresholds.tolist()
    conv.set_thresholds(2.0)
    try:
        assert {r.why for r in where(conv, images(3)).rows} == {"every exit is closed"}
    finally:
        conv.set_thresholds(before)


def test_as_table_and_as_json(spread: CompiledModule) -> None:
    found = where(spread, images(12))
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert len(data["rows"]) == 12
    assert data["rows"][0]["exits"][0]["confidence"] == pytest.approx(found.rows[0].exits[0].confidence)
    text = str(found)
    assert "closed" in text
    assert text.count(" * ") == 12  # one taken exit in every row
    assert "and 4 more rows" in str(where(spread, images(24)))


def test_keyword_inputs(bert: CompiledModule) -> None:
    found = where(bert, **tokens(3))
    assert len(found.rows) == 3
    assert all(r.prediction in (0, 1, 2) for r in found.rows)
    torch.testing.assert_close(
        torch.tensor([r.exits[-1].confidence for r in found.rows]), bert.observe(**tokens(3)).confidences[-1]
    )
