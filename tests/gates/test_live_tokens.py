"""Where every position halts by itself, position-wise parts run at live positions and give what the reference gives."""

from __future__ import annotations

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from eecompile import load, strategies
from eecompile.passes import find_token_parts
from eecompile.passes.live_positions import LivePositions
from tests.support import both, close, equal_bits, gelu_of, nightly, watch
from tests.support import compiled as eecompile
from tests.zoo import ZOO

TRANSFORMERS = ("bert", *map(nightly, ("vit", "gpt2_lm", "modernbert", "qwen3")))


def halting(model, args, kwargs, **options):
    """Compiled with units at random, so that positions differ."""
    fast = eecompile(
        model, strategies.Act(per_token=True, halting_bias=-0.5), example_inputs=args, example_kwargs=kwargs, **options
    )
    at_random(fast, 0)
    return fast


def at_random(fast, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in fast.gate_units.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (1.0 if p.ndim == 2 else 0.5))


def bert(width=32, layers=4):
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=4 * width,
        vocab_size=99,
    )
    return BertForSequenceClassification(config).eval()


def padded(batch, length=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, length + 1, (batch, 1), generator=generator)
    return {
        "input_ids": torch.randint(0, 99, (batch, length), generator=generator),
        "attention_mask": (torch.arange(length) < lengths).long(),
    }


def agrees(fast, args, kwargs):
    compact, reference = both(fast, *args, **kwargs)
    assert torch.equal(compact.steps, reference.steps)
    torch.testing.assert_close(compact.cost, reference.cost)
    torch.testing.assert_close(compact.trace.ponder, reference.trace.ponder)
    close(compact.output, reference.output)
    return compact


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_compact_agrees_with_the_reference(name, monkeypatch):
    monkeypatch.setattr(find_token_parts, "MOVING", 0.0)  # the models are too small for it to pay
    entry = ZOO[name]
    args, kwargs = entry.inputs(4)
    fast = halting(entry.model(), args, kwargs, **entry.options)
    steps = [s for h in fast.program.choices.chains for s in h.steps if s.live]
    parts = [fast.program.choices.parts[s.name] for s in steps]
    assert all(any(p.past for p in mine) for mine in parts), "the end of a block is position-wise"
    assert sum(p.flops for mine in parts for p in mine) >= 0.4 * sum(s.flops for s in steps)
    for batch in (1, 4, 9):
        at_random(fast, batch)
        agrees(fast, *entry.inputs(batch, seed=batch))


@pytest.fixture(scope="module")
def minilm():
    """As wide as MiniLM: parts pay, the projection of queries too."""
    return halting(bert(384, 3), (), padded(4))


def test_what_runs_at_live_positions(minilm):
    (chain,) = minilm.program.choices.chains
    assert [*minilm.program.choices.parts] == [s.name for s in chain.steps[1:]]
    for queries, rest in minilm.program.choices.parts.values():
        assert not queries.past
        assert rest.past
        products = [n for n in rest.nodes if n.startswith("linear")]
        assert len(products) == 3, "the attention's output and both layers of the MLP"
        assert (queries.flops, rest.flops) == (2 * 24 * 384**2, 2 * 24 * 384**2 * 9)
        assert 0.5 < queries.most_live < rest.most_live < 1
    assert "4 parts at live positions only" in minilm.history["find_token_parts"].summary
    assert [s.live_cost > 0.7 * s.cost for s in minilm.halts[0].steps] == [False, True, True]
    assert "of it at live positions only" in str(minilm)


@pytest.mark.parametrize("batch", [1, 4, 9])
def test_only_live_rows_of_the_mlp_are_computed(minilm, batch):
    at_random(minilm, 3)
    kwargs = padded(batch, seed=batch)
    result = agrees(minilm, (), kwargs)
    rows = [shape[0] * shape[1] for shape in gelu_of(watch(lambda: minilm(**kwargs)))]
    live = [int((result.steps > k).sum()) for k in range(3)]
    assert rows == [batch * 24, *live[1:]]
    assert rows[1] < 0.7 * rows[0]
    share = (result.steps.unsqueeze(-1) > torch.arange(1, 3)).float().mean(1)  # [B, 2], of each row's positions
    steps, parts = minilm.program.choices.chains[0].steps, minilm.program.choices.parts
    saved = [s.flops - (1 - share[:, k]) * sum(p.flops for p in parts[s.name]) for k, s in enumerate(steps[1:])]
    spent = sum(torch.where(share[:, k] > 0, c, torch.zeros_like(c)) for k, c in enumerate(saved)) + steps[0].flops
    spent = spent + steps[0].unit_flops * (1 + (share > 0).sum(1))
    outside = minilm.program.total_flops - sum(s.flops for s in steps)
    torch.testing.assert_close(result.cost, (spent + outside) / minilm.program.total_flops, rtol=1e-5, atol=0)


def test_with_all_positions_live_nothing_is_copied(minilm):
    with torch.no_grad():
        for unit in minilm.gate_units.children():
            unit.score.weight.zero_()
            unit.score.bias.fill_(-20.0)
    kwargs = {k: v if k == "input_ids" else torch.ones_like(v) for k, v in padded(3).items()}
    flat = minilm.program.signature.flatten((), kwargs)
    seen, before = watch(lambda: minilm(**kwargs)).ops, watch(lambda: minilm.source_graph(*flat)).ops
    for name in ("index_copy", "index_copy_", "index_select", "index", "clone"):
        assert seen[name] <= before[name], name


def test_small_parts_are_left_alone_and_a_loaded_program_has_the_same_parts(tmp_path):
    fast = halting(bert(32, 2), (), padded(4))
    (refused,) = [r.reason for r in fast.program.refusals if r.rule == "find_token_parts"]
    assert refused == "21 FLOPs for each element that gathering would move, wanted 80"
    step = fast.program.choices.chains[0].steps[1].name
    (part,) = fast.program.choices.parts[step]
    assert part.past
    fast.save(tmp_path / "program")
    back = load(tmp_path / "program")
    assert back.program.choices.parts[step] == (part,)
    kwargs = padded(3, seed=8)
    want, got = agrees(fast, (), kwargs), back.run(**kwargs)
    equal_bits(got.output, want.output)
    assert torch.equal(got.cost, want.cost)


def test_gradients_go_through_live_positions(minilm):
    at_random(minilm, 3)
    kwargs = padded(3, seed=2)
    found = []
    for executor in ("compact", "reference"):
        minilm.executor = executor
        for p in minilm.parameters():
            p.grad = None
        minilm(**kwargs).logits.sum().backward()
        found.append({n: p.grad for n, p in minilm.named_parameters() if p.grad is not None})
    minilm.executor = "compact"
    assert found[0].keys() == found[1].keys()
    for name, grad in found[1].items():
        torch.testing.assert_close(found[0][name], grad, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(("live", "few"), [(0.2, True), (0.95, False), (1.0, False)])
def test_the_share_above_which_all_are_computed(live, few):
    class Twice(torch.nn.Module):
        def forward(self, x):
            seen.append(x.shape)
            return (2 * x,)

    seen: list[torch.Size] = []
    runs = torch.zeros(4, 10, dtype=torch.bool)
    runs.view(-1)[: int(live * 40)] = True
    x, past = torch.randn(4, 10, 3), torch.randn(4, 10, 3)
    part = LivePositions(torch.fx.GraphModule(torch.nn.Module(), torch.fx.Graph()), 0.9)
    part.call = Twice()
    assert torch.equal(part(runs, past, x), torch.where(runs.unsqueeze(-1), 2 * x, past))
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(part(runs, None, strided)[runs], 2 * x[runs])
    assert seen == [(1, int(live * 40) if few else 40, 3)] * 2
