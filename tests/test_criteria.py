"""The criteria as a user meets them: what each says of a compiled model's exits, against definitions in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eecompile import CompiledModule, criteria, strategies
from eecompile.criteria import CRITERIA, REDUCTIONS, Criterion, criterion
from eecompile.errors import StrategyError
from eecompile.kernels.confidence import confidence
from tests.answering import answering
from tests.support import CLOSED, again, both, same_result
from tests.support import compiled as eecompile

NAN, INF = math.nan, math.inf
STATELESS = ["max_probability", "entropy", "margin", "energy"]


def defined(name: str, logits: Tensor, temperature: float, **options: Any) -> Tensor:
    """What tests/kernels/test_op_confidence.py holds against the formulas, in float64."""
    return confidence(logits, None, name, torch.tensor(temperature), dtype=torch.float64, **options)[0]


# ------------------------------------------------------------------------------------------------ models


class Net(nn.Module):
    """Five blocks on `[B, 8]`; weights large enough that the classes differ."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 8)) for _ in range(5))
        self.out = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.out(x)


class Tagger(nn.Module):
    """Four blocks on `[B, S, 8]`, one prediction a position, and a mask that nothing inside reads."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 8)) for _ in range(4))
        self.out = nn.Linear(8, 4)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        h = self.embed(input_ids)
        for block in self.blocks:
            h = h + block(h)
        return self.out(h) * attention_mask.unsqueeze(-1).to(h.dtype)


def made(kind: type[nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind().eval()


def rows(count: int, seed: int = 1) -> Tensor:
    return 3 * torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))


def sentences(count: int, length: int = 7, seed: int = 1) -> dict[str, Tensor]:
    """Every length from none to all positions real."""
    ids = torch.randint(0, 30, (count, length), generator=torch.Generator().manual_seed(seed))
    real = torch.arange(length)[None] < (torch.arange(count) % (length + 1))[:, None]
    return {"input_ids": ids, "attention_mask": real.long()}


def louder(fast: CompiledModule) -> CompiledModule:
    """Heads with larger weights: their confidences spread over most of [0, 1]."""
    with torch.no_grad():
        for p in fast.head_parameters():
            p.mul_(4.0)
    return fast


@pytest.fixture(scope="module")
def net() -> CompiledModule:
    return louder(eecompile(made(Net), strategies.Branchy(exits="every-block"), example_inputs=(rows(4),)))


@pytest.fixture(scope="module")
def tagger() -> CompiledModule:
    return louder(eecompile(made(Tagger), strategies.Branchy(exits=2), example_kwargs=sentences(6)))


def using(fast: CompiledModule, kind: Criterion | str, exits: object = "every-block") -> CompiledModule:
    """The same capture with another criterion."""
    return louder(again(fast, strategies.Branchy(exits=exits, criterion=kind)))


# ------------------------------------------------------------------------------------------------ options


@pytest.mark.parametrize("name", CRITERIA)
def test_a_criterion_by_name_by_itself_and_as_data(name: str) -> None:
    one = criterion(name)
    assert type(one) is CRITERIA[name]
    assert criterion(one) is one
    assert criterion(one.to_dict()) == one
    assert one.to_dict()["name"] == name
    assert 0 < one.default_threshold <= 1
    assert one.__doc__


def test_options_survive_as_data() -> None:
    for one in (criteria.Patience(exits_in_agreement=3, reduce="last"), criteria.Entropy(reduce="mean")):
        assert criterion(one.to_dict()) == one


def test_wrong_options_list_the_right_ones() -> None:
    with pytest.raises(StrategyError, match=r"unknown criterion(.|\n)*did you mean entropy"):
        criterion("entropie")
    with pytest.raises(StrategyError, match="unknown criterion"):
        criterion({"reduce": "min"})
    with pytest.raises(StrategyError, match=r"unknown reduction(.|\n)*did you mean mean"):
        criteria.Entropy(reduce="men")
    with pytest.raises(StrategyError, match="patience counts at least one exit"):
        criteria.Patience(exits_in_agreement=0)


def test_data_with_an_unknown_option_is_an_error() -> None:
    with pytest.raises(StrategyError, match=r"criterion 'entropy' has no such option(.|\n)*did you mean reduce"):
        criterion({"name": "entropy", "reduces": "min"})


# ------------------------------------------------------------------------------------------------ one value a row


@pytest.mark.parametrize("name", STATELESS)
def test_each_exit_says_what_the_definition_says(net: CompiledModule, name: str) -> None:
    fast = using(net, name)
    temperatures = [0.7, 1.0, 1.5, 2.0, 4.0][: len(fast.exits) + 1]
    fast.set_temperatures(temperatures)
    seen = fast.observe(rows(64))
    assert seen.outputs is not None and seen.confidences is not None
    for logits, got, t in zip(seen.outputs, seen.confidences, temperatures, strict=True):
        want = defined(name, logits, t)
        torch.testing.assert_close(got.double(), want, rtol=0, atol=3e-6)
        assert float(got.max() - got.min()) > 0.1  # or nothing would be tested
    spread = [float(c.median()) for c in seen.confidences[:-1]]
    fast.set_thresholds(spread)
    result = fast.run(rows(64))
    sure = torch.stack([c >= t for c, t in zip(seen.confidences, spread, strict=False)] + [torch.ones(64).bool()])
    assert torch.equal(result.exit_index, sure.long().argmax(0))
    want = torch.stack(seen.confidences)[result.exit_index, torch.arange(64)]
    torch.testing.assert_close(result.confidence, want, rtol=0, atol=1e-6)


def test_a_threshold_that_is_met_exactly_lets_a_row_leave(net: CompiledModule) -> None:
    fast = using(net, "max_probability")
    x = rows(9)
    first = fast.observe(x).confidences[0]  # type: ignore[index]
    for c in first:
        for threshold, leaves in ((c, first >= c), (torch.nextafter(c, torch.tensor(2.0)), first > c)):
            fast.set_thresholds([float(threshold), *[CLOSED] * (len(fast.exits) - 1)])
            assert torch.equal(fast.run(x).exit_index == 0, leaves)


BAD = torch.tensor(
    [[0.0, NAN, 0.0, 9.0], [INF, 0.0, 0.0, 0.0], [-INF, -INF, -INF, -INF], [9.0, -INF, -INF, -INF], [9.0, 0.0, 0.0, 0.0]]
)


@pytest.mark.parametrize("name", [*STATELESS, "patience"])
@pytest.mark.parametrize("executor", ["compact", "reference"])
def test_nan_and_infinity_are_never_sure(name: str, executor: str) -> None:
    """Not even where any confidence would do; a class that is masked out, and plain numbers, are."""
    fast = answering(criteria.Patience(exits_in_agreement=1) if name == "patience" else name, BAD)
    fast.executor = executor
    fast.set_thresholds(0.0)
    result = fast.run(torch.arange(5.0)[:, None])
    assert result.exit_index.tolist() == [1, 1, 1, 0, 0]
    assert bool(((result.confidence >= 0) & (result.confidence <= 1)).all())
    seen = fast.observe(torch.arange(5.0)[:, None]).confidences
    assert seen is not None
    assert seen[0][:3].tolist() == [0.0] * 3


# ------------------------------------------------------------------------------------------------ a learned score


def test_a_learned_score_is_the_sigmoid_of_its_logit(net: CompiledModule) -> None:
    fast = using(net, "learned")
    fast.set_temperatures([0.5, 2.0, 1.0, 3.0, 1.0][: len(fast.exits) + 1])
    x = rows(32)
    seen = fast.observe(x)
    assert seen.trace.scores is not None and seen.confidences is not None and seen.outputs is not None
    temperatures = fast.temperatures.tolist()
    for score, got, t in zip(seen.trace.scores, seen.confidences, temperatures, strict=False):
        torch.testing.assert_close(got.double(), 1 / (1 + (-score.double() / t).exp()), rtol=0, atol=1e-6)
    # the model's own end has no score: its largest probability
    want = defined("max_probability", seen.outputs[-1], temperatures[-1])
    torch.testing.assert_close(seen.confidences[-1].double(), want, rtol=0, atol=1e-6)
    fast.set_thresholds([float(c.median()) for c in seen.confidences[:-1]])
    compact, reference = both(fast, x)
    assert len(set(compact.exit_index.tolist())) > 2
    same_result(compact, reference)


def test_the_score_is_trained_and_the_classes_are_not_read(net: CompiledModule) -> None:
    """Confidence comes of the score alone: other class logits leave it as it is."""
    fast = using(net, "learned")
    x = rows(8)
    before = fast.observe(x).confidences
    with torch.no_grad():
        for e in fast.exits:
            for p in fast.branch(e.name).head.parameters():
                p.neg_()
    after = fast.observe(x).confidences
    for a, b in zip(before[:-1], after[:-1], strict=True):  # type: ignore[index]
        assert torch.equal(a, b)


# ------------------------------------------------------------------------------------------------ positions


@pytest.mark.parametrize("how", REDUCTIONS)
@pytest.mark.parametrize("name", STATELESS)
def test_positions_are_reduced_without_the_padding(tagger: CompiledModule, name: str, how: str) -> None:
    fast = using(tagger, CRITERIA[name](reduce=how), exits=2)
    call = sentences(16)
    seen = fast.observe(**call)
    assert seen.outputs is not None and seen.confidences is not None
    for logits, got in zip(seen.outputs, seen.confidences, strict=True):
        want = torch.nan_to_num(defined(name, logits, 1.0, reduce=how, mask=call["attention_mask"]), nan=0.0)
        torch.testing.assert_close(got.double(), want, rtol=0, atol=3e-6)


@pytest.mark.parametrize("how", REDUCTIONS)
def test_a_row_of_padding_alone_stays_to_the_end(tagger: CompiledModule, how: str) -> None:
    fast = using(tagger, criteria.Entropy(reduce=how), exits=2)
    fast.set_thresholds(0.0)
    call = sentences(9)
    compact, reference = both(fast, **call)
    alone = call["attention_mask"].sum(1) == 0
    assert alone.tolist() == [True, *[False] * 7, True]
    assert compact.exit_index.tolist() == [2 if a else 0 for a in alone]
    same_result(compact, reference)
