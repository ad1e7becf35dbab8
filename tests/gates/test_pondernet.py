"""PonderNet: what is trained is the expectation over where a row stops, what runs is the first step likely enough."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from eecompile import strategies
from eecompile.errors import EecompileError
from eecompile.training.objectives import PonderNet
from tests.gates.adaptive import rows, tower
from tests.support import close
from tests.support import compiled as eecompile

STEPS, PRIOR, BETA = 4, 0.3, 0.5
KINDS = {"over depth": {}, "one block again": {"blocks": "blocks.1", "max_steps": STEPS}}


def compiled(kind: str, spread: float = 1.0, **options: object):
    model = tower(STEPS)
    x, _, _ = rows(6, seed=1)
    strategy = strategies.Act(halting="pondernet", prior=PRIOR, beta=BETA, **{**KINDS[kind], **options})
    fast = eecompile(model, strategy, example_inputs=(x,))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in fast.gate_units.parameters():
            if p.ndim == 2:
                p.copy_(spread * torch.randn(p.shape, generator=generator))
    return model, fast


def by_hand(model, fast, kind: str, x: torch.Tensor):
    """The logits at every step and the probability of stopping there, from the user's own modules."""
    h, states = model.embed(x), []
    for k, block in enumerate(model.blocks):
        for _ in range(STEPS if kind != "over depth" and k == 1 else 1):
            h = block(h)
            if kind == "over depth" or k == 1:
                states.append(h)
    (chain,) = fast.program.choices.chains
    scores = [fast.graph_module.get_submodule(s.unit)(h, None) for s, h in zip(chain.steps, states, strict=True)]
    rest = [model.blocks[2:] if kind != "over depth" else [] for _ in states]
    logits = []
    for state, later in zip(states, rest, strict=True):
        for block in later:
            state = block(state)
        logits.append(model.classifier(model.norm(state)))
    return logits, torch.stack(scores, 1)


def expected(logits, scores, labels):
    """Loss and divergence, by going through every place where a row may stop."""
    total = 0.0
    for row in range(len(labels)):
        left, whole = torch.ones(()), sum(PRIOR * (1 - PRIOR) ** n for n in range(STEPS))
        for n in range(STEPS):
            p = left if n == STEPS - 1 else left * scores[row, n]
            left = left - p
            loss = F.cross_entropy(logits[n][row : row + 1], labels[row : row + 1])
            total = total + p * loss + BETA * p * torch.log(p / (PRIOR * (1 - PRIOR) ** n / whole))
    return total / len(labels)


@pytest.mark.parametrize("trunk", [False, True])
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_loss_and_gradient_are_those_of_the_enumerated_expectation(kind, trunk):
    model, fast = compiled(kind, spread=0.3)
    x, labels, _ = rows(6, seed=2)
    with fast.prepare_training(trunk):
        result = fast.run(x)
        assert len(result.trace.step_outputs) == STEPS and result.trace.step_scores.shape == (6, STEPS)
        parameters = [*fast.head_parameters(), *(fast.trunk_parameters() if trunk else ())]
        loss = fast.loss(result, labels)
        got = torch.autograd.grad(loss, parameters, allow_unused=True)
    logits, scores = by_hand(model, fast, kind, x)
    wanted = expected(logits, scores, labels)
    close(loss, wanted)
    want = torch.autograd.grad(wanted, parameters, allow_unused=True)
    for a, b in zip(got, want, strict=True):
        zero = torch.zeros(())
        torch.testing.assert_close(zero if a is None else a.norm(), zero if b is None else b.norm(), atol=1e-5, rtol=1e-3)
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)
    bias = fast.graph_module.get_submodule(fast.program.choices.chains[0].steps[0].unit).score.bias
    at = next(i for i, p in enumerate(parameters) if p is bias)
    values = []
    for step in (1e-2, -2e-2):
        with torch.no_grad(), fast.prepare_training(trunk):
            bias += step
            values.append(float(fast.loss(fast.run(x), labels)))
    assert (values[0] - values[1]) / 2e-2 == pytest.approx(float(got[at]), rel=2e-2, abs=1e-4)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_row_stops_at_the_first_step_by_which_it_has_stopped_likely_enough(kind):
    model, fast = compiled(kind, halting_bias=-1.5)
    x, _, _ = rows(7, seed=3)
    with torch.no_grad():
        logits, scores = by_hand(model, fast, kind, x)
    reached = 1 - (1 - scores).cumprod(1)
    seen: set[int] = set()
    for threshold in (0.3, 0.5, 0.9):
        fast.set_halting_threshold(threshold)
        enough = reached >= threshold * 0.99
        enough[:, -1] = True
        at = enough.float().argmax(1)
        for executor in ("reference", "compact", "simulate"):
            fast.executor = executor
            result = fast.run(x)
            assert result.steps.tolist() == (at + 1).tolist(), executor
            close(result.output, torch.stack(logits, 1)[torch.arange(7), at])
            with torch.no_grad():
                close(fast(x), result.output)
        seen |= set(at.tolist())
    assert len(seen) > 2


def test_training_says_how_many_steps_and_how_far_from_the_prior():
    _, fast = compiled("over depth", spread=0.1)
    assert fast.halting_threshold == 0.5
    x, labels, _ = rows(64, seed=4)
    report = fast.fit([(x, labels)] * 10, epochs=3, lr=0.03, progress=False, val_loader=[(x, labels)])
    weights = torch.tensor([PRIOR * (1 - PRIOR) ** n for n in range(STEPS)])
    mean = float((weights / weights.sum() * torch.arange(1, STEPS + 1)).sum())
    last = report.rows[-1]
    assert last.halts.divergence < 0.05 and last.halts.divergence < report.rows[0].halts.divergence
    assert abs(last.halts.steps - mean) < 0.4
    assert last.val_halts.steps == pytest.approx(float(fast.run(x).steps.float().mean()))
    assert "KL" in str(report) and report.to_dict()["rows"][-1]["halts"]["steps"] == last.halts.steps


def test_exits_of_another_strategy_are_trained_beside_it():
    x, labels, _ = rows(16, seed=6)
    both = strategies.Branchy(exits=["blocks.1"], head="linear", max_head_share=9.0) + strategies.Act(halting="pondernet")
    fast = eecompile(tower(STEPS), both, example_inputs=(x,))
    fast.train()
    fast.loss(fast.run(x), labels).backward()
    last = fast.program.choices.chains[0].steps[-1].unit  # what is left at the last step needs no score
    unused = {id(p) for p in fast.graph_module.get_submodule(last).parameters()}
    assert all(p.grad is not None for p in fast.head_parameters() if id(p) not in unused)


def test_a_loss_for_the_whole_batch_is_refused():
    _, fast = compiled("over depth")
    x, labels, _ = rows(6, seed=7)
    with pytest.raises(EecompileError, match="the loss of each row"):
        fast.fit([(x, labels)], loss=F.cross_entropy, progress=False)
    with pytest.raises(EecompileError, match="prior="):
        PonderNet(prior=0.0)


def test_two_steps_are_enough():
    """Then nothing but the run's report reads what the first step adds up."""
    _, fast = compiled("over depth", blocks=["blocks.1", "blocks.2"], halting_bias=0.0)
    x, _, _ = rows(7, seed=8)
    result = fast.run(x)
    assert set(result.steps.tolist()) == {1, 2}
    fast.executor = "reference"
    assert torch.equal(fast.run(x).steps, result.steps)
    close(result.output, fast(x))
