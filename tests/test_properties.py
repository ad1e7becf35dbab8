"""The invariants of the IR over random models, exits, criteria, thresholds and batches."""

from __future__ import annotations

import os
import random

import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from eecompile import CompiledModule, criteria, strategies
from tests.random_models import Spec, specs
from tests.support import (
    CLOSED,
    Fingerprint,
    again,
    both,
    close,
    equal_bits,
    patience_thresholds,
    random_thresholds,
    same_result,
    shares_parameters,
)
from tests.support import compiled as eecompile

WHERE = st.sampled_from([1, 2, 3, "every-block", (0.3, 0.7), (0.5,), "blocks.*"])
HEADS = st.sampled_from(["auto", "linear", "mlp"])
CRITERIA = st.sampled_from(
    [
        criteria.Entropy(),
        criteria.MaxProbability(reduce="mean"),
        criteria.Margin(reduce="last"),
        criteria.Energy(),
        criteria.Learned(),
        criteria.Patience(exits_in_agreement=1),
        criteria.Patience(exits_in_agreement=2),
    ]
)
ROWS = st.integers(1, 9)


def bounded(examples: int) -> settings:
    """So many random examples in `make test-all`, an eighth in `make test`."""
    return settings(
        max_examples=examples if os.environ.get("EECOMPILE_TESTS") == "all" else examples // 8 + 1,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


def compiled(spec: Spec, strategy: strategies.Strategy) -> tuple[torch.nn.Module, CompiledModule]:
    """The compiled model; that compiling changed nothing in it is checked on the way."""
    model = spec.model()
    before, generator = Fingerprint.of(model), torch.get_rng_state()
    options = {"prediction": "logits"} if spec.further else {}
    fast = eecompile(model, strategy, example_kwargs=spec.call(4, 6, seed=0), batch_axis=spec.batch_axis, **options)
    assert before.changes(model) == []
    assert torch.equal(torch.get_rng_state(), generator)
    shares_parameters(fast, model)
    return model, fast


def thresholds(fast: CompiledModule, call: dict[str, torch.Tensor], rng: random.Random) -> list[float]:
    kind = fast.program.exits[0].criterion
    if kind.stateful:
        return patience_thresholds(len(fast.exits), kind.patience, rng)
    seen = fast.observe(**call).confidences
    assert seen is not None
    return random_thresholds(seen[:-1], rng)


def check_row_alone(fast: CompiledModule, spec: Spec, call: dict[str, torch.Tensor], rows: int) -> None:
    whole = fast.run(**call)
    row = rows // 2
    axes = {"x": 1} if spec.kind == "second_axis" else {}
    one = {k: t.narrow(axes.get(k, 0), row, 1) for k, t in call.items()}
    alone = fast.run(**one)
    assert alone.exit_index.item() == whole.exit_index[row].item()
    close(fast.prediction_of(alone.output), fast.prediction_of(whole.output)[row : row + 1])


@bounded(16)
@given(
    spec=specs(),
    where=WHERE,
    head=HEADS,
    kind=CRITERIA,
    rows=st.tuples(ROWS, ROWS),
    length=st.integers(4, 9),
    luck=st.integers(0, 999),
)
def test_whatever_the_model(
    spec: Spec, where: object, head: str, kind: criteria.Criterion, rows: tuple[int, int], length: int, luck: int
) -> None:
    strategy = strategies.Branchy(exits=where, head=head, criterion=kind, max_head_share=1e9)
    model, fast = compiled(spec, strategy)
    note(f"{len(fast.exits)} exits at {[e.cut for e in fast.exits]}")
    before = Fingerprint.of(model)
    rng = random.Random(luck)
    for n in rows:
        call = spec.call(n, length, seed=luck)
        fast.set_thresholds(CLOSED)
        compact, reference = both(fast, **call)
        with torch.no_grad():
            equal_bits(compact.output, model(**call))
        equal_bits(reference.output, compact.output)
        assert compact.exit_index.tolist() == [len(fast.exits)] * n
        assert compact.cost.tolist() == [1.0] * n
        for _ in range(3):
            fast.set_thresholds(thresholds(fast, call, rng))
            compact, reference = both(fast, **call)
            same_result(compact, reference)
            with torch.no_grad():
                equal_bits(fast(**call), compact.output)
                check_row_alone(fast, spec, call, n)
    assert before.changes(model) == []


@bounded(5)
@given(spec=specs(), luck=st.integers(0, 999))
def test_every_criterion_at_every_exit_of_one_model(spec: Spec, luck: int) -> None:
    """Many programs of one capture: what one of them sets is its own."""
    _, first = compiled(spec, strategies.Branchy(exits="blocks.*", max_head_share=1e9, head="linear"))
    rng = random.Random(luck)
    first.set_thresholds(0.125)
    for name in sorted(set(criteria.CRITERIA) - {"routed"}):  # which needs a router
        strategy = strategies.Branchy(exits="blocks.*", max_head_share=1e9, head="linear", criterion=name)
        fast = again(first, strategy)
        for n in (1, rng.randint(2, 9)):
            call = spec.call(n, 6, seed=luck)
            fast.set_thresholds(thresholds(fast, call, rng))
            same_result(*both(fast, **call))
    assert first.thresholds.tolist() == [0.125] * len(first.exits)
