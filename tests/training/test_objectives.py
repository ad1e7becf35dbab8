"""Objectives: values against formulas written out, gradients, names, label mistakes."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn import functional as F

from eecompile.errors import EecompileError
from eecompile.result import Result, Trace
from eecompile.training.objectives import (
    OBJECTIVES,
    Distillation,
    Exits,
    ExitScore,
    PerExitLoss,
    Sum,
    WeightedCrossEntropy,
    objective,
)

OTHERS = (
    "exit_score",
    "per_exit_loss",
    "sum",
    "choice_cost",
    "regret",
    "reinforce",
    "ponder",
    "pondernet",
    "depth_targets",
)  # tested elsewhere
G = torch.Generator().manual_seed(0)


def made(shape=(5, 4), exits=2, scores=False) -> Result:
    outputs = tuple(torch.randn(shape, generator=G, requires_grad=True) for _ in range(exits + 1))
    score = tuple(torch.randn(shape[0], generator=G, requires_grad=True) for _ in range(exits))
    empty = torch.empty(0)
    return Result(empty, empty, empty, empty, trace=Trace(outputs=outputs, scores=score if scores else None))


def labels_for(shape):
    return torch.randint(0, shape[-1], shape[:-1], generator=G)


@pytest.mark.parametrize("shape", [(5, 4), (5, 3, 4)])
@pytest.mark.parametrize(("weights", "w"), [("uniform", [1, 1, 1]), ("linear", [1, 2, 3]), ([0, 3, 1], [0, 3, 1])])
def test_weighted_cross_entropy(shape, weights, w):
    r, y = made(shape), labels_for(shape)
    y.view(-1)[0] = -100
    each = [F.cross_entropy(o.flatten(0, -2), y.flatten(), ignore_index=-100) for o in r.outputs]
    wanted = sum(a * b for a, b in zip(w, each, strict=True)) / sum(w)
    torch.testing.assert_close(WeightedCrossEntropy(weights)(r, y), wanted)


@pytest.mark.parametrize("shape", [(5, 4), (5, 3, 4)])
def test_distillation_teaches_the_exits_and_not_the_teacher(shape):
    r, y = made(shape), labels_for(shape)
    y.view(-1)[1] = -100
    loss = Distillation(alpha=1.0, temperature=3.0, weights=[1, 1, 0])(r, y)
    real = (y != -100).flatten()
    p = torch.softmax(r.outputs[-1].detach().flatten(0, -2)[real].double() / 3, -1)
    wanted = sum(
        9 * (p * (p.log() - torch.log_softmax(o.flatten(0, -2)[real].double() / 3, -1))).sum(-1).mean()
        for o in r.outputs[:-1]
    )
    torch.testing.assert_close(loss.double(), wanted / 2, rtol=1e-5, atol=1e-6)
    loss.backward()
    assert r.outputs[0].grad is not None
    assert r.outputs[-1].grad is None or not r.outputs[-1].grad.any()


def test_distillation_needs_no_labels_when_alpha_is_one():
    loss = Distillation(alpha=1.0)(made(), None)
    assert loss.isfinite()
    with pytest.raises(EecompileError, match="no labels"):
        Distillation(alpha=0.5)(made(), None)


def test_exit_score_is_trained_against_being_right_and_moves_no_logits():
    r = made((6, 4), scores=True)
    y = r.outputs[0].argmax(-1)
    y[0] = -100
    loss = ExitScore()(r, y)
    wanted = [
        F.binary_cross_entropy_with_logits(s[1:], (o.argmax(-1) == y)[1:].float())
        for s, o in zip(r.trace.scores, r.outputs, strict=False)
    ]
    torch.testing.assert_close(loss, sum(wanted) / 2)
    loss.backward()
    assert r.outputs[0].grad is None
    assert r.trace.scores[0].grad is not None
    with pytest.raises(EecompileError, match="no exit scores"):
        ExitScore()(made(), y)


def test_sum_adds():
    r, y = made(scores=True), labels_for((5, 4))
    a, b = WeightedCrossEntropy(), ExitScore()
    wanted = a(r, y) + 0.5 * b(r, y)
    torch.testing.assert_close(Sum((a, b), (1.0, 0.5))(r, y), wanted)
    torch.testing.assert_close((a + b)(r, y), a(r, y) + b(r, y))
    assert objective("weighted_cross_entropy + exit_score") == a + b


def test_what_strategies_ask_for():
    r, y = made(scores=True), labels_for((5, 4))
    spec = {"name": "exits", "weights": [1, 2, 3], "distillation": 0.25, "learned": True}
    wanted = Distillation(alpha=0.25, weights=[1, 2, 3])(r, y) + ExitScore()(r, y)
    torch.testing.assert_close(objective(spec)(r, y), wanted)
    torch.testing.assert_close(Exits()(r, y), WeightedCrossEntropy()(r, y))


def test_own_loss_on_every_exit():
    r = made((5, 2))
    target = torch.zeros(5, 2)
    mine = PerExitLoss(F.mse_loss, weights=[1, 0, 1])
    torch.testing.assert_close(mine(r, target), (F.mse_loss(r.outputs[0], target) + F.mse_loss(r.outputs[2], target)) / 2)
    torch.testing.assert_close(mine.final(r, target), F.mse_loss(r.outputs[2], target))
    with pytest.raises(EecompileError, match="scalar"):
        PerExitLoss(lambda o, y: o)(r, target)
    loaded = objective(json.loads(json.dumps(mine.to_dict())))
    with pytest.raises(EecompileError, match="pass loss= again"):
        loaded(r, target)


@pytest.mark.parametrize(
    "made_",
    [
        WeightedCrossEntropy((1, 0, 2)),
        Distillation(0.3, 4.0, "linear"),
        ExitScore(),
        Exits("linear", 0.5, True),
        Sum((WeightedCrossEntropy(), ExitScore()), (1.0, 0.1)),
    ],
)
def test_survives_json(made_):
    assert objective(json.loads(json.dumps(made_.to_dict()))) == made_


def test_all_labels_left_out_gives_zero():
    r = made()
    loss = WeightedCrossEntropy()(r, torch.full((5,), -100))
    loss.backward()
    assert loss == 0
    assert not r.outputs[0].grad.any()


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("weighted_crossentropy", "did you mean weighted_cross_entropy"),
        ({"name": "nothing"}, "one of"),
        ({"name": "distillation", "beta": 1}, "unknown option"),
        ({"name": "exits", "distillation": 2.0}, "0 to 1"),
        ({"name": "weighted_cross_entropy", "weights": "square"}, "unknown weights"),
        ({"name": "weighted_cross_entropy", "weights": [0, 0]}, "not all 0"),
        ({"name": "weighted_cross_entropy", "weights": [1, -1]}, "0 or more"),
        ({"name": "distillation", "temperature": 0}, "positive"),
    ],
)
def test_bad_options(spec, text):
    with pytest.raises(EecompileError, match=text):
        objective(spec)


def test_wrong_number_of_weights_and_eval_results():
    with pytest.raises(EecompileError, match="one per exit"):
        WeightedCrossEntropy([1, 1])(made(), labels_for((5, 4)))
    empty = torch.empty(0)
    with pytest.raises(EecompileError, match=r"fast\.train\(\)"):
        WeightedCrossEntropy()(Result(empty, empty, empty, empty), labels_for((5, 4)))


# Those of routers and of trained ensembles ask for what they need first.
@pytest.mark.parametrize("name", [n for n in OBJECTIVES if n not in OTHERS and not n.startswith(("route", "ensemble"))])
@pytest.mark.parametrize(
    ("labels", "text"),
    [
        (torch.tensor([0, 1, 2, 3, 4]), "values from 4 to 4"),
        (torch.tensor([0, -1, 2, 3, 1]), "values from -1 to -1"),
        (torch.tensor([0, 1, 2, 3]), "do not fit"),
        (torch.zeros(5, 1).long(), r"squeeze\(-1\)"),
        (torch.zeros(5), "wrong dtype"),
        (torch.full((5, 4), 0.5), "neither classes nor yes or no"),
        (torch.zeros(5).bool(), "wrong dtype"),
        (["a"] * 5, "not class indices"),
        (None, "no labels"),
    ],
)
def test_label_mistakes_name_the_batch(name, labels, text):
    with pytest.raises(EecompileError, match=text) as error:
        objective(name)(made(), labels, where="batch 7 of the loader")
    assert "batch 7 of the loader" in str(error.value)
