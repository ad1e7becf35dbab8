"""evaluate: every number against one computed by hand, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eecompile.criteria import Patience
from eecompile.errors import EecompileError
from eecompile.result import Result, Trace
from eecompile.training.curve import first_exit
from eecompile.training.evaluate import evaluate
from eecompile.training.scores import agreement, right
from tests.training.fake import Fake, batched, blobs


class Table(Fake):
    """Gives stored outputs: the input is the row numbers."""

    def __init__(self, outputs, thresholds, criterion=None):
        super().__init__(exits=len(outputs) - 1, criterion=criterion)
        self.table = outputs
        self.set_thresholds(thresholds)

    def _outputs(self, rows):
        return tuple(o[rows] for o in self.table), None


def logits(classes, sure, n_classes=3):
    """[n, C] logits with the given argmax and max probability."""
    p = torch.full((len(classes), n_classes), 0.0)
    for row, (c, s) in enumerate(zip(classes, sure, strict=True)):
        p[row] = (1 - s) / (n_classes - 1)
        p[row, c] = s
    return p.log()


ROWS = torch.arange(4)
FAST = Table(
    [
        logits([0, 1, 2, 0], [0.95, 0.6, 0.95, 0.5]),
        logits([0, 1, 1, 1], [0.9, 0.9, 0.6, 0.6]),
        logits([0, 1, 1, 2], [0.8, 0.8, 0.8, 0.8]),
    ],
    [0.9, 0.85],
)
LABELS = torch.tensor([0, 1, 1, 1])


def test_a_full_model_that_is_worse_than_one_class_for_all_is_named():
    n = 60
    always = logits([0] * n, [0.9] * n)
    table = Table([always, always], [2.0])
    rows, others = torch.arange(n), torch.arange(n) % 6
    said = str(evaluate(table, [(rows, torch.where(others == 0, 0, 1))])).replace("\n", " ")
    assert "right on 16.7% of these rows, class 1 for all of them on 83.3%. Look at prediction=" in said
    for labels in (torch.zeros(n, dtype=torch.long), torch.where(others < 4, 0, 1), others % 2):
        assert "Look at prediction=" not in str(evaluate(table, [(rows, labels)]))


def test_numbers_by_hand():
    report = evaluate(FAST, [(ROWS[:3], LABELS[:3]), (ROWS[3:], LABELS[3:])])
    # row 0 leaves at 0 (right), row 1 at 1 (right), row 2 at 0 (wrong), row 3 at the end (wrong)
    assert report.samples == report.labelled == 4
    assert report.accuracy == 0.5
    assert report.full_accuracy == 0.75
    assert report.drop == 0.25
    assert report.agreement == 0.75
    assert [row.share for row in report.rows] == [0.5, 0.25, 0.25]
    assert [row.accuracy_leaving for row in report.rows] == [0.5, 1.0, 0.0]
    assert [row.accuracy_if_all for row in report.rows] == [0.5, 1.0, 0.75]
    assert [row.agreement_if_all for row in report.rows] == [0.5, 0.75, 1.0]
    costs = FAST.costs((True, True)).tolist()
    assert [row.cost for row in report.rows] == pytest.approx(costs)
    assert report.mean_cost == pytest.approx((2 * costs[0] + costs[1] + costs[2]) / 4)
    json.dumps(report.to_dict(), allow_nan=False)
    assert "50.00%" in str(report)


def test_closed_exits():
    fast = Table(FAST.table, [2.0, 2.0])
    report = evaluate(fast, [(ROWS, LABELS)], curve=[0.0, 0.9, 1.5])
    assert report.accuracy == report.full_accuracy
    assert report.agreement == report.mean_cost == 1.0
    assert report.rows[0].accuracy_leaving is None
    assert not report.rows[0].open
    assert "closed" in str(report)
    # all closed: the curve shows what opening them would give
    assert [p["accuracy"] for p in report.curve] == [0.5, 0.5, 0.75]
    assert report.curve[2]["cost"] == 1.0
    assert [p["early"] for p in report.curve] == [1.0, 0.75, 0.0]


def test_left_out_labels_and_no_labels():
    labels = LABELS.clone()
    labels[2] = -100
    report = evaluate(FAST, [(ROWS, labels)])
    assert (report.samples, report.labelled) == (4, 3)
    assert report.accuracy == report.full_accuracy == pytest.approx(2 / 3)
    report = evaluate(FAST, [ROWS])
    assert report.accuracy is report.full_accuracy is report.drop is None
    assert report.agreement == 0.75
    assert report.labelled == 0
    json.dumps(report.to_dict(), allow_nan=False)
    str(report)


def test_positions_are_averaged_within_a_row():
    z = torch.zeros(2, 3, 4)
    z[..., 1] = 1
    y = torch.tensor([[1, 1, 0], [1, -100, -100]])
    score, valid = right(z, y)
    assert score.tolist() == pytest.approx([2 / 3, 1.0])
    assert valid.all()
    other = z.clone()
    other[0, 2, 3] = 9
    assert agreement(other, z, y).tolist() == pytest.approx([2 / 3, 1.0])
    assert right(z, torch.full((2, 3), -100))[1].sum() == 0


def test_metric():
    target = torch.randn(4, 3)
    metric = lambda prediction, wanted: -(prediction.exp() - wanted).abs().mean(1)  # noqa: E731
    report = evaluate(FAST, [(ROWS, target)], metric=metric, curve=3)
    wanted = metric(FAST.table[-1], target).double().mean()
    assert report.full_accuracy == pytest.approx(float(wanted))
    assert report.score == "metric"
    assert report.agreement is None
    with pytest.raises(EecompileError, match="one score per row"):
        evaluate(FAST, [(ROWS, target)], metric=lambda p, y: p.mean())
    with pytest.raises(EecompileError, match="not finite"):
        evaluate(FAST, [(ROWS, target)], metric=lambda p, y: p.mean(1) * float("nan"))


def test_errors():
    with pytest.raises(EecompileError, match="empty"):
        evaluate(FAST, [])
    with pytest.raises(EecompileError, match="batch 1") as error:
        evaluate(FAST, [(ROWS, LABELS), (ROWS, LABELS + 2)])
    assert "0 to 2" in str(error.value)
    with pytest.raises(EecompileError, match="others do not"):
        evaluate(FAST, [(ROWS, LABELS), ROWS])
    with pytest.raises(EecompileError, match="two points"):
        evaluate(FAST, [(ROWS, LABELS)], curve=1)
    with pytest.raises(EecompileError, match="with state"):
        evaluate(Table(FAST.table, [1.0, 1.0], Patience()), [(ROWS, LABELS)], curve=True)


def test_leaves_the_module_as_it_was():
    fast = Fake()
    before = {n: t.clone() for n, t in fast.state_dict().items()}
    evaluate(fast, batched(*blobs()))
    assert fast.training
    assert all(torch.equal(t, before[n]) for n, t in fast.state_dict().items())


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_first_exit_is_the_first_that_is_sure(data):
    n, e = data.draw(st.integers(1, 6)), data.draw(st.integers(0, 4))
    grid = st.sampled_from([0.0, 0.25, 0.5, 1.0, float("nan"), float("inf")])
    table = torch.tensor([[data.draw(grid) for _ in range(e)] for _ in range(n)]).reshape(n, e)
    at = torch.tensor([data.draw(st.sampled_from([0.0, 0.25, 0.5, 1.0, 1.01, 2.0])) for _ in range(e)])
    for row, index in zip(table.tolist(), first_exit(table, at).tolist(), strict=True):
        sure = [k for k, c in enumerate(row) if at[k] <= 1 and c >= float(at[k]) and c != float("inf")]
        assert index == (sure[0] if sure else e)


def test_reports_what_observe_says():
    """exit_index and cost come from the module itself, not from a second opinion."""
    n = 5

    class Odd(Fake):
        def observe(self, x):
            z = torch.zeros(n, 3)
            trace = Trace((z,) * 3, (torch.ones(n),) * 3)
            return Result(z, torch.ones(n).long(), torch.ones(n), torch.full((n,), 0.4), trace=trace)

    report = evaluate(Odd(), [(torch.zeros(n, 8), torch.zeros(n).long())])
    assert report.mean_cost == pytest.approx(0.4)
    assert [row.share for row in report.rows] == [0, 1, 0]
