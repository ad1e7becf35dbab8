"""`insert_exits`: the marked graph computes everything, selects, and shares what it is given to share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from eecompile.criteria import Criterion, Entropy, Learned, MaxProbability
from eecompile.errors import StrategyError
from eecompile.heads import Branch
from eecompile.ir.settings import EXITS
from eecompile.ir.settings import TEMPERATURES_BUFFER as TEMPERATURES
from eecompile.ir.settings import THRESHOLDS_BUFFER as THRESHOLDS
from eecompile.passes import InsertExits, facts, run_passes
from eecompile.passes.insert_exits import HEADS
from eecompile.program import Program
from tests.passes.conftest import Source, built, code, noise, same_bits, source

SOURCES = ["resnet", "lenet", "masked", "tagger", "sequence_first", "cells"]


@pytest.fixture(params=SOURCES)
def any_source(request: pytest.FixtureRequest) -> Source:
    found: Source = request.getfixturevalue(request.param)
    return found


def marked(s: Source, where: Any = 2, **options: Any) -> Program:
    return s.upto("insert_exits", where, **options)


def run(program: Program, flat: list[Tensor]) -> dict[str, Any]:
    """The marked graph's flat outputs by meaning."""
    assert program.marked is not None
    with torch.no_grad():
        out = program.marked.eval()(*flat)
    n, e = len(program.signature.outputs), len(program.exits)
    return {
        "leaves": out[:n],
        "index": out[n],
        "confidence": out[n + 1],
        "outputs": out[n + 2 : n + 3 + e],
        "confidences": out[n + 3 + e : n + 4 + 2 * e],
        "scores": out[n + 4 + 2 * e :],
    }


class Recorder(fx.Interpreter):
    """Runs a graph and keeps every value by name."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm, garbage_collect_values=False)

    def values(self, flat: list[Tensor]) -> dict[str, Any]:
        with torch.no_grad():
            self.run(*flat)
        return {n.name: v for n, v in self.env.items()}


def test_each_exit_is_its_head_on_the_value_at_its_cut(any_source: Source) -> None:
    program = marked(any_source)
    flat = any_source.inputs(5)
    found = run(program, flat)
    trunk = Recorder(program.history["normalize"].graph_module).values(flat)
    for k, e in enumerate(program.exits):
        branch = facts.attribute(program.marked, e.head)
        with torch.no_grad():
            want = branch(*(trunk[n] for n in e.head_inputs))
        torch.testing.assert_close(found["outputs"][k], want, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        own = any_source.captured.graph_module(*flat)
    same_bits([found["outputs"][-1]], [own[0]])


def test_the_first_exit_that_is_sure_is_selected(any_source: Source) -> None:
    program = marked(any_source)
    flat = any_source.inputs(6)
    seen = run(program, flat)["confidences"]
    thresholds = torch.stack([c.median() for c in seen[:-1]])
    getattr(program.marked, THRESHOLDS).copy_(thresholds)
    found = run(program, flat)
    sure = torch.stack([*(c >= t for c, t in zip(seen, thresholds, strict=False)), torch.ones(6, dtype=torch.bool)])
    want = sure.to(torch.int64).argmax(0)
    assert torch.equal(found["index"], want)
    assert found["index"].dtype == torch.int64
    assert len(set(want.tolist())) > 1
    outputs, rows = torch.stack(found["outputs"]), torch.arange(6)
    same_bits([found["leaves"][0]], [outputs[want, rows]])
    same_bits([found["confidence"]], [torch.stack(seen)[want, rows]])


def test_padding_does_not_count_towards_the_confidence_of_positions(tagger: Source) -> None:
    program = marked(tagger)
    call = tagger.named(6)
    ids, mask = call["input_ids"], call["attention_mask"]
    assert (mask == 0).any()
    found = run(program, list(call.values()))
    other = torch.where(mask.bool(), ids, (ids + 7) % 90 + 1)  # other tokens under the padding
    changed = run(program, list({**call, "input_ids": other}.values()))
    for a, b in zip(found["confidences"], changed["confidences"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    worst = [per_position(o, mask) for o in found["outputs"]]
    for a, want in zip(found["confidences"], worst, strict=True):
        torch.testing.assert_close(a, want, rtol=1e-5, atol=1e-5)


def per_position(logits: Tensor, mask: Tensor) -> Tensor:
    """Smallest entropy confidence over the real positions, in float64."""
    p = torch.softmax(logits.double(), -1)
    sure = 1 + (p * p.log()).sum(-1) / torch.tensor(float(logits.shape[-1])).double().log()
    return sure.masked_fill(mask == 0, 9).amin(-1).float()


def test_heads_are_new_and_the_trunk_is_shared(any_source: Source) -> None:
    program = marked(any_source)
    assert program.marked is not None
    own = {id(p) for p in program.source.parameters()}
    heads = {id(p) for p in getattr(program.marked, HEADS).parameters()}
    assert heads
    assert not heads & own
    assert {id(p) for p in program.marked.parameters()} == own | heads


def test_the_seed_makes_the_heads_and_leaves_the_generator(resnet: Source) -> None:
    base = resnet.upto("place_exits")
    before = torch.get_rng_state()
    a, b, c = (run_passes(base, [InsertExits(seed=s)]) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    weights = [p.marked.eecompile_heads.exit_0.head.classifier.weight for p in (a, b, c)]  # type: ignore[union-attr]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_heads_are_shared_and_settings_kept(resnet: Source) -> None:
    first = marked(resnet)
    assert first.marked is not None
    heads = {e.name: facts.attribute(first.marked, e.head) for e in first.exits}
    settings = first.settings.with_values(EXITS, 0.25)
    second = run_passes(resnet.upto("place_exits").replace(settings=settings), [InsertExits(heads=heads)])
    assert second.marked is not None
    assert facts.attribute(second.marked, "eecompile_heads.exit_0") is heads["exit_0"]
    assert second.settings == settings
    assert set(getattr(second.marked, THRESHOLDS).tolist()) == {0.25}


def test_a_users_module_is_copied_for_each_exit_and_a_factory_is_asked_for_each() -> None:
    s = source(built(Widths), (noise(4, 8),))
    mine = nn.Linear(8, 3)
    program = marked(s, 2, head=mine)
    copies = [facts.attribute(program.marked, e.head).head for e in program.exits]
    assert all(type(h) is nn.Linear and h is not mine for h in copies)
    assert copies[0] is not copies[1]
    same_bits([h.weight for h in copies], [mine.weight] * 2)
    asked: list[Any] = []

    def factory(site: Any) -> nn.Module:
        asked.append(site)
        return nn.Linear(site.width, site.classes)

    marked(s, 2, head=factory)
    assert {x.sizes for x in asked} == {("batch", 8)}


class Widths(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(4))
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for b in self.blocks:
            x = b(x)
        return self.out(x)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (nn.Linear(8, 4), "logits of the wrong size"),
        (nn.Linear(5, 3), "does not run on the value at its place"),
        (lambda site: "no module", "a head factory gave no module"),
        ("conv", "head 'conv' does not fit the value at this place"),
        ("linaer", "unknown head"),
    ],
)
def test_a_head_that_does_not_fit(head: Any, message: str) -> None:
    s = source(built(Widths), (noise(4, 8),))
    with pytest.raises(StrategyError, match=message):
        marked(s, 2, head=head)


def test_one_threshold_for_each_or_one_for_all(resnet: Source) -> None:
    for given, want in ((0.5, [0.5, 0.5]), ((0.25, 0.75), [0.25, 0.75])):
        program = marked(resnet, threshold=given)
        assert getattr(program.marked, THRESHOLDS).tolist() == want
        assert getattr(program.marked, TEMPERATURES).tolist() == [1.0] * 3
    with pytest.raises(StrategyError, match="wrong number of thresholds") as error:
        marked(resnet, threshold=(0.1, 0.2, 0.3))
    assert error.value.got == 3


class InPlace(nn.Module):
    """The block's own value is overwritten right after it."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Tanh(), nn.Linear(8, 8)) for _ in range(3))
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for b in self.blocks:
            x = b(x).mul_(2.0)
        return self.out(x)


def test_a_value_that_is_overwritten_later_keeps_its_numbers_and_its_gradient() -> None:
    s = source(built(InPlace), (noise(4, 8),))
    program = marked(s, ["blocks.0", "blocks.1"], head="linear", threshold=2.0)
    assert program.marked is not None
    flat = s.inputs(3)
    same_bits([run(program, flat)["leaves"][0]], [s.captured.graph_module(*flat)[0]])
    out = program.marked.train()(*flat)
    sum(o.sum() for o in out[3:6]).backward()
    for name, p in program.marked.named_parameters():
        assert p.grad is not None, name
        assert torch.isfinite(p.grad).all()
        p.grad = None


class Several(nn.Module):
    """Further outputs: one from the middle, one from the end."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(4))
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        seen = []
        for b in self.blocks:
            x = b(x)
            seen.append(x)
        return {"logits": self.out(x), "middle": seen[1], "end": seen[3]}


def test_what_was_not_computed_yet_is_nan() -> None:
    s = source(built(Several), (noise(4, 8),))
    at = next(i for i, leaf in enumerate(s.captured.signature.outputs) if leaf.path.endswith("logits"))
    program = run_passes(s.program(prediction=at), s.passes(["blocks.0", "blocks.2"], head="linear", threshold=0.0)[:6])
    by_path = {leaf.path: i for i, leaf in enumerate(program.signature.outputs)}
    middle, end = (next(i for p, i in by_path.items() if p.endswith(n)) for n in ("middle", "end"))
    for thresholds, nan_middle, nan_end in (([0.0, 0.0], True, True), ([2.0, 0.0], False, True), ([2.0, 2.0], False, False)):
        getattr(program.marked, THRESHOLDS).copy_(torch.tensor(thresholds))
        leaves = run(program, s.inputs(2))["leaves"]
        assert bool(leaves[middle].isnan().all()) is nan_middle
        assert bool(leaves[end].isnan().all()) is nan_end


def test_the_given_program_and_its_graph_stay(masked: Source) -> None:
    base = masked.upto("place_exits")
    text = code(base.graph_module)
    after = run_passes(base, [InsertExits()])
    assert code(base.graph_module) == text
    assert after.source is base.source
    assert not hasattr(base.graph_module, HEADS)
    assert isinstance(facts.attribute(after.marked, after.exits[0].head), Branch)
    again = run_passes(base, [InsertExits()])
    assert code(again.graph_module) == code(after.graph_module)


def test_kinds_of_criteria_are_kept_with_the_exit() -> None:
    kinds: list[Criterion] = [Entropy(), MaxProbability(), Learned()]
    s = source(built(Widths), (noise(4, 8),))
    assert [marked(s, 1, criterion=c).exits[0].criterion for c in kinds] == kinds
