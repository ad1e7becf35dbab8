"""Combined exits against float64 formulas: ensembles, the surest so far, closed exits, NaN, positions, gradients."""

from __future__ import annotations

import math

import pytest
import torch

from eecompile.errors import StrategyError
from eecompile.kernels.combine import check_combination, ensemble, keep_best, weighted_ensemble

ops = torch.ops.eecompile
OPEN, CLOSED = torch.tensor(0.5), torch.tensor(2.0)


def logits(shape, seed=0, dtype=torch.float32):
    return (3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


@pytest.mark.parametrize("shape", [(1, 2), (5, 7), (63, 10), (4, 3, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_ensemble_is_the_geometric_mean(shape, dtype):
    exits = [logits(shape, s, dtype) for s in range(4)]
    state = None
    for k, z in enumerate(exits):
        out, state = ops.ensemble(z, state)
        assert out.dtype == dtype
        if k == 0:
            assert torch.equal(out, z), "the first exit answers with its own logits, bit for bit"
            continue
        p = torch.stack([torch.softmax(e.double(), -1) for e in exits[: k + 1]])
        geometric = p.log().mean(0).exp()
        want = geometric / geometric.sum(-1, keepdim=True)
        got = torch.softmax(out.double(), -1)
        torch.testing.assert_close(got, want, atol=2e-2 if dtype == torch.bfloat16 else 1e-6, rtol=1e-2)
    assert state.shape == (*shape[:-1], shape[-1] + 1)
    assert bool((state[..., -1] == 4).all())


def test_a_closed_exit_is_no_part_of_the_ensemble():
    a, b, c = (logits((6, 4), s) for s in range(3))
    _, held = ops.ensemble(a, None, OPEN)
    _, skipped = ops.ensemble(b, held, CLOSED)
    assert torch.equal(skipped, held)
    got, _ = ops.ensemble(c, skipped, OPEN)
    want, _ = ops.ensemble(c, held, OPEN)
    assert torch.equal(got, want)
    _, nothing = ops.ensemble(a, None, CLOSED)
    assert torch.equal(ops.ensemble(b, nothing, OPEN)[0], b), "the first open exit answers for itself"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_no_numbers_do_not_enter_the_ensemble(bad):
    a, b, c = (logits((3, 4), s) for s in range(3))
    b[1] = bad if bad != math.inf else b[1].index_fill(0, torch.tensor([2]), math.inf)
    _, state = ops.ensemble(a, None)
    out, state = ops.ensemble(b, state)
    assert torch.equal(out[1].nan_to_num(), b[1].nan_to_num()), "handed on as they are"
    got, _ = ops.ensemble(c, state)
    want = torch.stack([torch.log_softmax(a[1], -1), torch.log_softmax(c[1], -1)]).mean(0)
    torch.testing.assert_close(got[1], want)


def test_one_masked_class_stays_masked():
    a, b = logits((2, 4), 0), logits((2, 4), 1)
    a[:, 3] = b[:, 3] = -math.inf
    _, state = ops.ensemble(a, None)
    out, _ = ops.ensemble(b, state)
    assert bool((out[:, 3] == -math.inf).all())
    assert bool(out[:, :3].isfinite().all())


@pytest.mark.parametrize("shape", [(5, 7), (4, 3, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_surest_so_far(shape, dtype):
    exits = [logits(shape, s, dtype) for s in range(4)]
    g = torch.Generator().manual_seed(5)
    confidences = [torch.rand(shape[0], generator=g) for _ in exits]
    confidences[2][0] = confidences[1][0] = 0.99  # a tie: the later one
    confidences[1][1] = math.nan
    state = None
    for k in range(4):
        out, surest, state = ops.keep_best(exits[k], confidences[k], state)
        table = torch.stack(confidences[: k + 1]).nan_to_num(nan=-1)
        for row in range(shape[0]):
            at = max(range(k + 1), key=lambda i: (table[i, row].item(), i))
            assert torch.equal(out[row], exits[at][row]), (k, row)
            assert surest[row] == confidences[at][row]


def test_the_surest_of_unreadable_and_closed_exits():
    a, b = logits((3, 4), 0), logits((3, 4), 1)
    nan = torch.full((3,), math.nan)
    out, surest, state = ops.keep_best(a, nan, None)
    assert torch.equal(out, a)
    assert bool(surest.isnan().all())
    out, surest, _ = ops.keep_best(b, torch.zeros(3), state)
    assert torch.equal(out, b)
    assert surest.tolist() == [0, 0, 0]
    _, _, skipped = ops.keep_best(a, torch.ones(3), None, CLOSED)
    out, surest, _ = ops.keep_best(b, torch.full((3,), 0.25), skipped, OPEN)
    assert torch.equal(out, b)
    assert surest.tolist() == [0.25] * 3


def test_operators_are_registered_as_they_should():
    z, c = logits((3, 4)), torch.rand(3)
    _, state = ensemble(z, None)
    torch.library.opcheck(ops.ensemble, (z, None, None))
    torch.library.opcheck(ops.ensemble, (z.requires_grad_(), state, OPEN))
    _, _, held = keep_best(z.detach(), c, None)
    torch.library.opcheck(ops.keep_best, (z, c, held, OPEN))


def test_gradients_reach_every_exit_of_an_ensemble():
    a, b = logits((3, 4), 0, torch.float64).requires_grad_(), logits((3, 4), 1, torch.float64).requires_grad_()

    def out(a, b):
        return ops.ensemble(b, ops.ensemble(a, None)[1])[0]

    assert torch.autograd.gradcheck(out, (a, b))


def test_names():
    assert check_combination("ensemble") == "ensemble"
    with pytest.raises(StrategyError, match="unknown combination of exits"):
        check_combination("vote")


def weights(exits, classes, seed=9):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(exits, exits, generator=g) * 0.5, torch.randn(exits, classes, generator=g)


@pytest.mark.parametrize("shape", [(1, 2), (5, 7), (4, 3, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_weighted_ensemble_is_the_papers_formula(shape, dtype):
    """q_m(i) in proportion to b_m(i) times the product over j <= m of p_j(i) to the power w_mj."""
    exits = [logits(shape, s, dtype) for s in range(4)]
    log_w, log_b = weights(4, shape[-1])
    state = None
    for m, z in enumerate(exits):
        out, state = ops.weighted_ensemble(z, state, log_w, log_b, m)
        assert out.dtype == dtype
        p = torch.stack([torch.softmax(e.double(), -1) for e in exits[: m + 1]], -1)
        q = log_b[m].double().exp() * (p ** log_w[m, : m + 1].double().exp()).prod(-1)
        got = torch.softmax(out.double(), -1)
        torch.testing.assert_close(
            got, q / q.sum(-1, keepdim=True), atol=2e-2 if dtype == torch.bfloat16 else 1e-5, rtol=1e-2
        )
    assert state.shape == (*shape[:-1], 4, shape[-1])


def test_untrained_weights_are_the_plain_ensemble():
    from eecompile.passes.insert_exits import EnsembleWeights

    own = EnsembleWeights(3, 5)
    state = plain = None
    for m in range(3):
        z = logits((6, 5), m)
        got, state = weighted_ensemble(z, state, own.weights, own.bias, m)
        want, plain = ensemble(z, plain)
        torch.testing.assert_close(torch.softmax(got, -1), torch.softmax(want, -1))


def test_closed_exits_and_logits_that_are_no_numbers_do_not_enter_the_weighted_ensemble():
    a, b, c = (logits((3, 4), s) for s in range(3))
    log_w, log_b = weights(3, 4)
    _, held = ops.weighted_ensemble(a, None, log_w, log_b, 0, OPEN)
    _, skipped = ops.weighted_ensemble(b, held, log_w, log_b, 1, CLOSED)
    assert torch.equal(skipped, held)
    b[1, 2] = math.nan
    out, state = ops.weighted_ensemble(b, held, log_w, log_b, 1, OPEN)
    assert bool(out[1].isnan().any())
    assert not bool(out[[0, 2]].isnan().any())
    assert torch.equal(state[1, 1], torch.zeros(4))
    out, _ = ops.weighted_ensemble(c, state, log_w, log_b, 2, OPEN)
    assert not bool(out.isnan().any())


def test_gradients_of_the_weighted_ensemble():
    z, log_w, log_b = logits((3, 4), 1, torch.float64), *(t.double() for t in weights(3, 4))
    _, state = weighted_ensemble(logits((3, 4), 0, torch.float64), None, log_w, log_b, 0)
    given = [t.clone().requires_grad_() for t in (z, log_w, log_b)]
    torch.autograd.gradcheck(lambda *t: ops.weighted_ensemble(t[0], state, t[1], t[2], 1)[0], given)
