"""The search against exhaustive enumeration, ties, closed exits, state, size."""

from __future__ import annotations

import itertools
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eecompile.calibration.evidence import Evidence, pattern, remembered, sane
from eecompile.calibration.search import Search, candidates, front, patterns
from eecompile.calibration.stateful import agreement_confidences, all_or_none
from eecompile.criteria import MaxProbability, Patience
from eecompile.ir.settings import CLOSED


def costs(e, head=0.02):
    base = torch.linspace(0, 1, e + 2)[1:]

    def of(is_open):
        return base + head * torch.tensor([*map(float, is_open), 0.0]).cumsum(0)

    return remembered(of)


def random_evidence(n, e, seed, levels=None, head=0.02):
    """Confident rows are right more often; `levels` makes ties."""
    g = torch.Generator().manual_seed(seed)
    c = torch.rand(n, e, generator=g)
    if levels:
        c = (c * levels).round() / levels
    wrong = torch.rand(n, e, generator=g) > 0.3 + 0.7 * c
    loss = torch.cat([wrong.double(), torch.zeros(n, 1)], 1)
    return Evidence(c, loss, costs(e, head))


def everything(evidence):
    """Every distinct choice of thresholds, as (loss, cost)."""
    options = [[*evidence.confidences[:, k].unique().tolist(), CLOSED] for k in range(evidence.exits)]
    return [evidence.measure(torch.tensor(t)) for t in itertools.product(*options)]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 14), st.integers(1, 2), st.integers(0, 10**6), st.sampled_from([None, 4]))
def test_the_priced_optimum_is_found(n, e, seed, levels):
    """Two exits: descent from both ends finds the exhaustive optimum of cost + price * loss for most prices."""
    evidence = random_evidence(n, e, seed, levels)
    exact = everything(evidence)
    search = Search(evidence)
    found = [evidence.measure(v) for v in search.candidates(1.0)]
    for price in (0.1, 0.5, 2.0, 20.0):
        best = min(cost * n + price * loss for loss, cost in exact)
        mine = min(cost * n + price * loss for loss, cost in found)
        assert mine <= best + 1e-9 + 0.02 * abs(best)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 30), st.integers(1, 4), st.integers(0, 10**6), st.sampled_from([None, 3]), st.floats(0, 3))
def test_descent_never_gets_worse_and_keeps_the_budget(n, e, seed, levels, budget):
    evidence = random_evidence(n, e, seed, levels)
    search = Search(evidence)
    at = torch.full((e,), CLOSED)
    value = 1e9
    for _ in range(4):
        at = search.sweep(at, 1.7)
        loss, cost = evidence.measure(at)
        assert cost * n + 1.7 * loss <= value + 1e-6
        value = cost * n + 1.7 * loss
    at, cost = torch.full((e,), CLOSED), 1e9
    for _ in range(4):
        at = search.sweep(at, None, budget)
        loss, now = evidence.measure(at)
        assert loss <= budget + 1e-6
        assert now <= cost + 1e-9
        cost = now


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 20), st.integers(0, 10**6), st.sampled_from([None, 3]))
def test_a_threshold_lets_exactly_its_rows_leave(n, seed, levels):
    evidence = random_evidence(n, 1, seed, levels)
    search = Search(evidence)
    c = evidence.confidences[:, 0]
    for position in search.ends[0].nonzero()[:, 0].tolist():
        t = torch.tensor(search.threshold(0, position), dtype=torch.float32)
        assert int((c >= t).sum()) == position + 1
        assert search.ranks(t[None])[0] == position + 1
    for rank in range(n + 1):
        t = search.at_rank(0, rank)
        left = int((c >= t).sum()) if t <= 1 else 0
        assert left >= rank
        assert left == rank or levels


def test_neighbouring_floats_are_told_apart():
    a = torch.tensor(0.9)
    c = torch.stack([a, torch.nextafter(a, torch.tensor(0.0)), torch.tensor(0.5)])[:, None]
    search = Search(Evidence(c, torch.zeros(3, 2, dtype=torch.float64), costs(1)))
    assert [int((c[:, 0] >= torch.tensor(search.threshold(0, p))).sum()) for p in range(3)] == [1, 2, 3]


def test_rows_without_a_finite_confidence_never_leave():
    c = sane(torch.tensor([[float("nan")], [float("inf")], [0.4], [0.0]]))
    evidence = Evidence(c, torch.zeros(4, 2, dtype=torch.float64), costs(1))
    best = candidates(evidence, 1.0)[-1][2]
    assert evidence.leave(best).tolist() == [1, 1, 0, 0]


def test_a_head_that_costs_more_than_it_saves_stays_closed():
    evidence = random_evidence(200, 3, 0, head=5.0)
    assert all(not any(pattern(v)) for _, _, v in candidates(evidence, 1.0))


def test_the_front_is_a_front():
    evidence = random_evidence(300, 3, 1)
    found = candidates(evidence, 0.3)
    assert len(found) > 20
    for (a, b, _), (c, d, _) in itertools.pairwise(found):
        assert a < c
        assert b > d
    again = candidates(random_evidence(300, 3, 1), 0.3)
    assert all(torch.equal(x[2], y[2]) for x, y in zip(found, again, strict=True))
    assert front(evidence.measure, [found[3][2], found[3][2]])[0][:2] == found[3][:2]


def test_beats_one_threshold_for_all():
    evidence = random_evidence(2000, 4, 3)
    found = candidates(evidence, 0.2)
    for t in torch.linspace(0.3, 0.99, 20).tolist():
        loss, cost = evidence.measure(torch.full((4,), t))
        if loss > 0.2 * 2000:
            continue
        assert min(c for total, c, _ in found if total <= loss) <= cost + 0.01


@pytest.mark.nightly
@pytest.mark.parametrize("e", [24])
def test_large(e):
    evidence = random_evidence(5_000, e, 0)
    started = time.process_time()
    found = candidates(evidence, 0.015)
    assert time.process_time() - started < 20
    assert found


def test_a_search_that_is_stopped_gives_what_it_has():
    evidence = random_evidence(400, 4, 3)
    whole = candidates(evidence, 0.05)
    for most in (0, 5, 50):
        asked = itertools.count()
        found = candidates(evidence, 0.05, lambda asked=asked, most=most: next(asked) >= most)
        assert next(asked) < most + 400, "nothing more is computed"
        assert 0 < len(found) <= len(whole)
        assert [p[0] for p in found] == sorted(p[0] for p in found)
        assert all(evidence.measure(v) == (total, cost) for total, cost, v in found)


def test_patterns():
    assert len(patterns(3)) == 7
    many = patterns(24)
    assert len(many) < 2000
    assert (True,) * 24 in many
    assert all(any(p) for p in many)


def patience_by_hand(predictions, is_open, p):
    found = torch.zeros(predictions.shape)
    for row in range(len(predictions)):
        last, count = None, 0
        for k in range(predictions.shape[1]):
            now = int(predictions[row, k])
            here = count + 1 if now == last else 1
            found[row, k] = min(here / p, 1)
            if is_open[k]:
                last, count = now, here
    return found


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 4), st.integers(0, 10**6))
def test_patience_is_counted_again_for_every_set_of_open_exits(n, e, p, seed):
    g = torch.Generator().manual_seed(seed)
    predictions = torch.randint(0, 3, (n, e), generator=g)
    compute = agreement_confidences(predictions, torch.ones(n, e), [Patience(exits_in_agreement=p)] * e)
    for is_open in itertools.product((False, True), repeat=e):
        assert torch.equal(compute(is_open), patience_by_hand(predictions, is_open, p))


def test_unreadable_rows_and_other_criteria_beside_patience():
    c = torch.tensor([[0.5, float("nan")], [0.5, 1.0]])
    criteria = [MaxProbability(), Patience(exits_in_agreement=1)]
    found = agreement_confidences(torch.zeros(2, 2).long(), c, criteria)((True, True))
    assert found[0, 1].isnan()
    assert found[:, 0].tolist() == [0.5, 0.5]
    assert found[1, 1] == 1.0


def test_candidates_with_state_are_measured_with_their_own_pattern():
    g = torch.Generator().manual_seed(0)
    predictions = torch.randint(0, 2, (200, 4), generator=g)
    recompute = agreement_confidences(predictions, torch.ones(200, 4), [Patience(exits_in_agreement=2)] * 4)
    loss = torch.cat([(torch.rand(200, 4, generator=g) < 0.2).double(), torch.zeros(200, 1)], 1)
    evidence = Evidence(recompute((True,) * 4), loss, costs(4), recompute)
    for total, cost, vector in candidates(evidence, 1.0):
        is_open = pattern(vector)
        by_hand = patience_by_hand(predictions, is_open, 2)
        index = [next((k for k in range(4) if is_open[k] and by_hand[r, k] >= vector[k]), 4) for r in range(200)]
        assert evidence.leave(vector).tolist() == index
        assert total == sum(float(loss[r, k]) for r, k in enumerate(index))
        assert cost == pytest.approx(float(evidence.costs(is_open)[index].mean()))
    blocked = all_or_none(evidence.confidences)
    assert (blocked((True, False, True, True)) == -1).all()
    assert torch.equal(
        evidence.part(torch.arange(5)).of((True, False, False, True)),
        recompute((True, False, False, True))[:5],
    )
