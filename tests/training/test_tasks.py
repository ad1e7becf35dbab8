"""Tasks that are not one class of several: found from the labels, or named with the way that fits."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from eecompile import CalibrationError, CompiledModule, EecompileError, StrategyError, criteria, eecompile, strategies
from tests.support import both, same_result

X = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
SETS = (torch.arange(128).view(32, 4) % 3 == 0).float()


def compiled(classes: int) -> CompiledModule:
    return copy.deepcopy(program(classes))


@cache
def program(classes: int) -> CompiledModule:
    torch.manual_seed(0)
    layers = [m for _ in range(3) for m in (nn.Linear(8, 8), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Linear(8, classes)).eval()
    return eecompile(model, strategies.Branchy(exits=2), example_inputs=X)


YES = SETS[:, :1]


@pytest.mark.parametrize(
    ("classes", "labels", "task"),
    [
        (4, torch.arange(32) % 4, "classification"),
        (4, SETS, "multi_label"),
        (4, SETS.bool(), "multi_label"),
        (4, SETS.long(), "multi_label"),
        (1, YES, "multi_label"),
        (1, YES[:, 0], "multi_label"),
        (1, YES[:, 0].long(), "multi_label"),
        (1, YES.bool(), "multi_label"),
        (1, X[:, 0], "regression"),
        (4, X[:, :4], "regression"),
    ],
)
def test_the_task_is_found_from_the_labels(classes: int, labels: torch.Tensor, task: str) -> None:
    fast = compiled(classes)
    report = fast.fit([(X, labels)], epochs=1, progress=False)
    assert (fast.task, report.task) == (task, task)
    outputs = fast.observe(X).outputs
    wanted = labels.reshape(-1, classes).float() if task != "classification" else labels
    kinds: dict[str, Any] = {
        "classification": F.cross_entropy,
        "multi_label": F.binary_cross_entropy_with_logits,
        "regression": F.mse_loss,
    }
    losses = [float(kinds[task](output, wanted)) for output in outputs]
    assert report.rows[-1].loss == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    said = {"classification": "", "multi_label": "binary cross entropy", "regression": "mean squared error"}
    assert said[task] in str(report)
    assert ("multi_label=True" in str(report)) == (task == "multi_label" and classes > 1)


@pytest.mark.parametrize("classes", [1, 4])
def test_answers_are_scored_and_calibrated_as_yes_or_no(classes: int) -> None:
    fast, labels = compiled(classes), SETS[:, :classes]
    fast.fit([(X, labels)], epochs=1, progress=False)
    z, y = fast.full(X), labels > 0.5
    seen = fast.evaluate([(X, labels)])
    assert seen.full_accuracy == pytest.approx(float(((z > 0) == y).all(1).double().mean()))
    assert seen.agreement == pytest.approx(float(((fast(X) > 0) == (z > 0)).all(1).double().mean()))
    for asked in ([(X, labels)], [(X, None)]):
        fast.calibrate(asked, target="agreement", max_drop=0.0, delta=None)
        assert ((fast(X) > 0) == (z > 0)).all()
    fast.calibrate([(X, labels)], max_drop=0.0, delta=None)
    assert ((fast(X) > 0) == y).all(1).double().mean() >= ((z > 0) == y).all(1).double().mean()


def test_one_logit_is_as_sure_as_its_answer() -> None:
    fast = compiled(1)
    fast.fit([(X, YES)], epochs=1, progress=False)
    for criterion, wanted in (("max_probability", lambda p: p.maximum(1 - p)), ("margin", lambda p: (2 * p - 1).abs())):
        one = eecompile(fast.original, strategies.Branchy(exits=2, criterion=criterion), example_inputs=X)
        seen = one.observe(X)
        for output, confidence in zip(seen.outputs, seen.confidences, strict=True):
            torch.testing.assert_close(confidence, wanted(output[:, 0].sigmoid()))
        one.set_thresholds(float(seen.confidences[0].median()) + 1e-4)
        with torch.no_grad():  # as if trained
            next(one.head_parameters()).mul_(1.5)
        same_result(*both(one, X))


@pytest.mark.parametrize("ends", [True, False], ids=["by its sigmoid", "by the option"])
def test_several_labels_are_as_sure_as_the_least_sure(ends: bool) -> None:
    kind: Any = "max_probability" if ends else criteria.MaxProbability(multi_label=True)
    model = compiled(4).original
    model = nn.Sequential(model, nn.Sigmoid()) if ends else model
    fast = eecompile(model.eval(), strategies.Branchy(exits=2, criterion=kind), example_inputs=X)
    seen = fast.observe(X)
    for output, confidence in zip(seen.outputs, seen.confidences, strict=True):
        p = output.sigmoid()
        torch.testing.assert_close(confidence, p.maximum(1 - p).amin(1))


def test_an_ensemble_of_single_logits_is_refused() -> None:
    with pytest.raises(StrategyError, match="several classes"):
        eecompile(compiled(1).original, strategies.Branchy(exits=2, combine="ensemble"), example_inputs=X)


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (F.one_hot(torch.arange(32) % 4).float(), "argmax"),
        (F.one_hot(torch.arange(32) % 4), "multi_label"),
        (torch.full((32, 4), 0.25), "cross_entropy"),
    ],
    ids=["one-hot", "one-hot integers", "probabilities"],
)
def test_labels_of_two_meanings_are_refused(labels: torch.Tensor, said: str) -> None:
    fast = compiled(4)
    with pytest.raises(EecompileError, match="labels may be") as caught:
        fast.fit([(X, labels)], epochs=1, progress=False)
    assert said in str(caught.value)
    if said != "cross_entropy":
        with pytest.raises(EecompileError, match="labels may be"):
            fast.evaluate([(X, labels)])
        fast.task = "multi_label"
        assert fast.fit([(X, labels)], epochs=1, progress=False).task == "multi_label"


def test_numbers_have_no_accuracy() -> None:
    fast = compiled(1)
    fast.fit([(X, X[:, 0])], epochs=1, progress=False)
    for call in (fast.evaluate, fast.calibrate):
        with pytest.raises(EecompileError, match="no accuracy") as caught:
            call([(X, X[:, 0])])
        assert "metric=" in str(caught.value)
    with pytest.raises(EecompileError, match="neither classes nor yes or no"):
        compiled(4).loss(compiled(4).train().run(X), X[:, :4])


class Config:
    problem_type, num_labels = None, 4


@pytest.mark.parametrize(
    ("given", "labels", "classes", "task"),
    [
        ("multi_label_classification", F.one_hot(torch.arange(32) % 4).float(), 4, "multi_label"),
        ("regression", SETS, 4, "regression"),
        (None, YES, 1, "regression"),
    ],
)
def test_the_config_of_transformers_counts(given: Any, labels: torch.Tensor, classes: int, task: str) -> None:
    fast = compiled(classes)
    config: Any = Config()
    config.problem_type, config.num_labels = given, classes
    fast.original.config = config  # type: ignore[union-attr]
    assert fast.fit([(X, labels)], epochs=1, progress=False).task == task


def test_the_first_batch_is_looked_at_and_not_lost() -> None:
    fast = compiled(1)
    seen = fast.fit(iter([(X, YES), (X, YES)]), epochs=1, progress=False)
    assert seen.task == "multi_label"
    assert fast.fit([(X, YES), (X, YES)], epochs=1, progress=False).rows[-1].loss == seen.rows[-1].loss


@pytest.mark.parametrize("classes", [1, 4], ids=["one score", "trained with loss="])
def test_agreement_of_the_largest_score_is_refused_where_it_is_no_answer(classes: int) -> None:
    fast = compiled(classes)
    if classes > 1:
        fast.fit([(X, SETS)], epochs=1, loss=F.binary_cross_entropy_with_logits, progress=False)
    with pytest.raises(CalibrationError, match="these choose none"):
        fast.calibrate([(X, None)], target="agreement")

    def same_set(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return ((z > 0) == (y > 0)).all(-1).double()

    fast.calibrate([(X, fast.full(X))], metric=same_set, max_drop=0.0, delta=None)
    assert same_set(fast(X), fast.full(X)).all()


@pytest.mark.parametrize("end", [torch.sigmoid, lambda z: z.sigmoid_(), lambda z: torch.sigmoid(z).clone()])
def test_agreement_of_a_model_that_ends_in_a_sigmoid_is_that_of_all_its_labels(end: Any) -> None:
    class Labels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layers = nn.Sequential(*[m for _ in range(3) for m in (nn.Linear(8, 8), nn.ReLU())], nn.Linear(8, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = end(self.layers(x))
            return found

    fast = eecompile(Labels().eval(), strategies.Branchy(exits=1), example_inputs=X)
    fast.fit([(X, SETS)], epochs=1, progress=False)
    fast.calibrate([(X, None)], target="agreement", max_drop=0.0, delta=None)
    assert ((fast(X) > 0.5) == (fast.full(X) > 0.5)).all()


def test_classes_still_agree() -> None:
    fast = compiled(4)
    fast.fit([(X, torch.arange(32) % 4)], epochs=1, progress=False)
    fast.calibrate([(X, None)], target="agreement", max_drop=0.0, delta=None)
    assert torch.equal(fast(X).argmax(1), fast.full(X).argmax(1))


def test_a_task_is_checked_and_an_own_loop_says_it_too() -> None:
    x = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    fast = eecompile(model, strategies.Branchy(exits=1, max_head_share=9.0), example_inputs=(x[:4],))
    with pytest.raises(StrategyError, match="did you mean multi_label"):
        fast.task = "multilabel"
    assert fast.task is None
    fast.train()
    fast.loss(fast.run(x), (x[:, :3] > 0).float())
    assert fast.task == "multi_label"
