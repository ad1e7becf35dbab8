"""`place_exits`: every way to say where, what is refused and why, and the model's own tail as the head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eecompile.criteria import Learned
from eecompile.errors import PassError, StrategyError
from eecompile.passes import PlaceExits, run_passes
from eecompile.program import Program
from tests.passes.conftest import Source, built, code, noise, recipe, source

LAYERS = [f"layer{i}.{j}" for i in (1, 2, 3) for j in (0, 1)]


def placed(s: Source, where: Any, **options: Any) -> Program:
    return s.upto("place_exits", where, **options)


def cuts(program: Program) -> list[str]:
    return [e.cut for e in program.exits]


def reasons(program: Program) -> dict[str, str]:
    return {r.node: r.reason for r in program.refusals if r.rule == "place_exits"}


# ------------------------------------------------------------------------------------------------ where


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_number_is_spaced_by_cost(resnet: Source, count: int) -> None:
    program = placed(resnet, count, head="linear")
    depths = {c.name: c.depth for c in program.structure.cuts if c.is_block}
    for k, e in enumerate(program.exits):
        wanted = (k + 1) / (count + 1)
        assert abs(e.depth - wanted) == min(abs(d - wanted) for d in depths.values())
        assert e.depth == depths[e.cut]
    assert [e.name for e in program.exits] == [f"exit_{k}" for k in range(count)]
    assert [e.head for e in program.exits] == [f"eecompile_heads.exit_{k}" for k in range(count)]


def test_more_exits_than_places_gives_all_places_and_says_so(lenet: Source) -> None:
    program = placed(lenet, 9, head="auto")
    assert 0 < len(program.exits) < 9
    assert sum("no free cut left" in r.reason for r in program.refusals) == 9 - len(program.exits)


def test_every_block(resnet: Source) -> None:
    program = placed(resnet, "every-block", head="linear")
    assert cuts(program) == LAYERS[:-1]  # after the last there is nothing left to save
    assert "leaving here saves" in reasons(program)["layer3.1"]


def test_every_block_wants_blocks(lenet: Source) -> None:
    with pytest.raises(StrategyError, match='exits="every-block" on a model without repeated blocks'):
        placed(lenet, "every-block")


def test_everywhere_keeps_what_is_worth_its_head(resnet: Source) -> None:
    program = placed(resnet, "everywhere", head="linear")
    assert set(cuts(program)) <= set(LAYERS)
    for before, e in zip((0.0, *(e.depth for e in program.exits)), program.exits, strict=False):
        assert e.depth - before >= 0.03
        assert 1 - e.depth >= 0.03
    assert all("of work" in r for n, r in reasons(program).items() if "leaving here" not in r)


@pytest.mark.parametrize(
    ("where", "want"),
    [
        ("layer1.1", ["layer1.1"]),
        (["layer2.0", "layer1.0"], ["layer1.0", "layer2.0"]),  # graph order, whatever was asked for first
        ("layer*.1", ["layer1.1", "layer2.1"]),
        ("layer[12].0", ["layer1.0", "layer2.0"]),
        (["layer1.*", "layer1.1"], ["layer1.0", "layer1.1"]),  # once, though named twice
    ],
)
def test_names_with_wildcards(resnet: Source, where: Any, want: list[str]) -> None:
    assert cuts(placed(resnet, where, head="linear")) == want


def test_a_node_is_a_name_too(resnet: Source) -> None:
    value = next(c.value for c in resnet.upto("find_cuts").structure.cuts if c.name == "layer2.0")
    assert cuts(placed(resnet, value, head="linear")) == ["layer2.0"]


def test_fractions_of_the_cost(resnet: Source) -> None:
    program = placed(resnet, [0.25, 0.6], head="linear")
    able = [c for c in program.structure.cuts if c.is_block or c.dominates]
    assert [e.depth for e in program.exits] == [
        min((c.depth for c in able if c.depth > 0), key=lambda d, w=w: abs(d - w)) for w in (0.25, 0.6)
    ]
    assert len(placed(resnet, 0.5, head="linear").exits) == 1
    both = placed(resnet, [0.5, "layer1.0"], head="linear")
    assert len(both.exits) == 2
    assert "layer1.0" in cuts(both)


def test_an_unknown_name_lists_near_ones(resnet: Source) -> None:
    with pytest.raises(StrategyError, match="no cut has this name") as error:
        placed(resnet, "layer1.7")
    assert error.value.got == "layer1.7"
    assert "did you mean layer1.1, layer1.0" in str(error.value.wanted)
    assert "eecompile inspect" in str(error.value.hint)


# ------------------------------------------------------------------------------------------------ refusals


def test_an_exit_that_costs_more_than_it_saves_is_refused(resnet: Source) -> None:
    def wide(site: Any) -> nn.Module:
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(site.width, 300_000), nn.Linear(300_000, 10))

    program = placed(resnet, 1, head="linear")
    total = program.total_flops
    with pytest.raises(StrategyError, match="no place for an exit") as error:
        placed(resnet, "every-block", head=wide)
    got = str(error.value.got)
    for name in LAYERS:  # each candidate with its own figures
        cut = next(c for c in program.structure.cuts if c.name == name)
        width = next(v.shape[1] for v in cut.live if v.node == cut.value)
        cost = (2 * 300_000 * (width + 10) + 80) / total
        assert f"{name}: head and decision cost {cost:.1%} of the model, leaving here saves {1 - cut.depth:.1%}" in got
    with pytest.raises(StrategyError, match="no exit fits where it was asked for") as error:
        placed(resnet, "layer3.0", head=wide)
    assert error.value.where == "layer3.0"
    assert "leaving here saves" in str(error.value.got)


def test_the_head_may_be_held_to_less(resnet: Source) -> None:
    free = placed(resnet, "every-block", head="conv")
    tight = placed(resnet, "every-block", head="conv", max_head_share=0.1)
    assert set(cuts(tight)) < set(cuts(free))
    for e in tight.exits:
        assert e.head_flops < 0.1 * (1 - e.depth) * tight.total_flops


def test_head_flops_are_those_of_the_head(resnet: Source) -> None:
    program = placed(resnet, ["layer1.1"], head="linear", criterion=Learned())
    (e,) = program.exits
    # classifier and exit score on 8 channels, and 8 operations a class to decide
    assert e.head_flops == 2 * 8 * 10 + 2 * 8 * 1 + 8 * 10


def test_predictions_per_position_need_the_same_positions(tagger: Source) -> None:
    program = placed(tagger, "every-block")
    assert cuts(program) == ["layers.0", "layers.1"]

    class Pooled(nn.Module):
        """Half the positions inside, all of them again at the end."""

        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(8, 8)
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(3))
            self.out = nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            h = self.embed(x)[:, ::2]
            for b in self.blocks:
                h = b(h)
            return self.out(h.repeat_interleave(2, 1))

    s = source(built(Pooled), (noise(4, 6, 8),))
    with pytest.raises(StrategyError) as error:
        placed(s, "every-block")
    assert "the model predicts at 6 positions, the value here is ['batch', 3, 8]" in str(error.value.got)


def test_a_value_without_a_head_of_its_own_wants_one_from_the_user() -> None:
    class Volume(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(nn.Conv3d(2, 2, 3, padding=1), nn.ReLU()) for _ in range(3))
            self.out = nn.Linear(2, 4)

        def forward(self, x: Tensor) -> Tensor:
            for b in self.blocks:
                x = b(x)
            return self.out(x.mean((2, 3, 4)))

    s = source(built(Volume), (noise(4, 2, 4, 4, 4),))
    with pytest.raises(StrategyError, match=r"no built-in head for a value \['batch', 2, 4, 4, 4\]"):
        placed(s, "every-block")
    pooled = nn.Sequential(nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(2, 4))
    assert cuts(placed(s, "every-block", head=pooled)) == ["blocks.0", "blocks.1"]


# ------------------------------------------------------------------------------------------------ the model's own tail


def test_the_models_own_tail_as_the_head(masked: Source) -> None:
    program = masked.upto("verify", "every-block", head="shared", threshold=2.0)
    assert cuts(program) == ["layers.0", "layers.1"]
    assert {e.head_kind for e in program.exits} == {"shared"}
    own = {id(p) for p in program.source.parameters()}
    assert {id(p) for p in program.marked.parameters()} == own  # nothing new to train
    model_tail = program.source
    flat, mask = masked.inputs(3), masked.named(3)["attention_mask"]
    with torch.no_grad():
        outputs = program.marked(*flat)[3:5]
        names = {e.cut: e for e in program.exits}
        for out, e in zip(outputs, names.values(), strict=True):
            h = value_at(model_tail, e.node, flat)
            real = mask.unsqueeze(-1).to(h.dtype)
            norm = nn.functional.layer_norm(h, (16,), *params(model_tail, "norm"))
            want = nn.functional.linear((norm * real).sum(1) / real.sum(1), *params(model_tail, "out"))
            torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-6)


def params(gm: Any, name: str) -> tuple[Tensor, Tensor]:
    module = gm.get_submodule(name)
    return module.weight, module.bias


def value_at(gm: Any, node: str, flat: list[Tensor]) -> Tensor:
    class Peek(torch.fx.Interpreter):
        seen: Tensor

        def run_node(self, n: torch.fx.Node) -> Any:
            out = super().run_node(n)
            if n.name == node:
                self.seen = out
            return out

    peek = Peek(gm)
    peek.run(*flat)
    return peek.seen


def test_the_tail_is_refused_where_the_shape_is_another(resnet: Source) -> None:
    program = placed(resnet, "every-block", head="shared")
    assert cuts(program) == ["layer3.0"]
    assert reasons(program)["layer1.0"] == (
        "the model's own head reads ['batch', 32, 4, 4], the value here is ['batch', 8, 16, 16]"
    )


def test_a_model_without_blocks_has_no_tail(lenet: Source) -> None:
    with pytest.raises(StrategyError, match="own final layers cannot be reused") as error:
        placed(lenet, 2, head="shared")
    assert "no repeated block" in str(error.value.got)
    assert error.value.hint == 'use head="auto"'


# ------------------------------------------------------------------------------------------------ the pass


def test_the_graph_stays_as_it_is(resnet: Source) -> None:
    before = resnet.upto("find_cuts")
    after = run_passes(before, [PlaceExits(recipe(3), resnet.example)])
    assert after.graph_module is before.graph_module
    assert not after.history[-1].modified
    again = run_passes(after, [PlaceExits(recipe(3), resnet.example)])
    assert again.exits == after.exits
    assert code(again.graph_module) == code(before.graph_module)
    for e in after.exits:
        assert f"{e.name} after {e.cut} at {e.depth:.0%}" in after.history[-1].summary


def test_the_prediction_must_be_known(resnet: Source) -> None:
    program = run_passes(resnet.program(prediction=None), resnet.passes()[:4])
    with pytest.raises(PassError, match="prediction leaf is not known"):
        run_passes(program, [PlaceExits(recipe(1), resnet.example)])


def test_the_mask_of_an_exit(masked: Source) -> None:
    assert {e.mask_input for e in placed(masked, 2).exits} == {"attention_mask"}
    with pytest.raises(PassError, match="no input has the name given as mask=") as error:
        placed(masked, 2, mask="padding")
    assert set(str(error.value.wanted).split(", ")) == {"input_ids", "attention_mask"}
