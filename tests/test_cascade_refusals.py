"""What a cascade refuses, with both figures; how its models are ordered, fed, calibrated and trained."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eecompile import CalibrationError, CaptureError, EecompileError, StrategyError, load, strategies
from eecompile.passes.lower import schedule
from tests.support import CLOSED, again, both, equal_bits, same_result
from tests.support import compiled as eecompile

CLASSES = 3


class Net(nn.Module):
    """Layers of one width: the more, the dearer."""

    def __init__(self, depth: int = 1, width: int = 8, classes: int = CLASSES, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            layers: list[nn.Module] = []
            for k in range(depth):
                layers += [nn.Linear(4 if k == 0 else width, width), nn.Dropout(0.2), nn.Tanh()]
            self.layers = nn.Sequential(*layers)
            self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.layers(x))
        return out


class Tokens(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).unsqueeze(1).expand(-1, 2, -1)


class Halved(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).double()


class Pair(Net):
    """Its own output type, two inputs, and a second tensor that could be the prediction too."""

    def forward(self, x: Tensor, scale: Tensor) -> dict[str, Tensor]:
        y = super().forward(x * scale)
        return {"hidden": y + 1, "scores": y}


class Turned(Net):
    """Classes first."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).t()


X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


def three() -> list[nn.Module]:
    return [Net(1).eval(), Net(2, 16, seed=1).eval(), Net(4, 32, seed=2).eval()]


def refused(error: type[EecompileError], *parts: str, models: Any = None, strategy: Any = "cascade", **options: Any) -> None:
    with pytest.raises(error) as caught:
        eecompile(three() if models is None else models, strategy, **{"example_inputs": (X,), **options})
    for part in parts:
        assert re.search(part, str(caught.value)), str(caught.value)


def test_models_must_agree_in_their_classes():
    refused(StrategyError, "5 classes", "3 classes", "net_0", models=[Net(classes=5), Net(3)])


def test_models_must_agree_in_shape_and_dtype():
    refused(StrategyError, r"\[6, 2, 3\]", r"\[6, 3\]", models=[Tokens(), Net(3)])
    refused(StrategyError, "float64", "float32", models=[Halved(), Net(3)])


@pytest.mark.parametrize(
    "prepare",
    [lambda x: x[:-1], lambda x: x.repeat(2, 1), lambda x: (x.view(3, 8)[:, :4],)],
    ids=["fewer", "more", "folded"],
)
def test_a_preparation_may_not_change_the_batch(prepare):
    refused(CaptureError, "changes the batch", "6 rows", strategy=strategies.Cascade(prepare=[prepare, None, None]))


def test_a_model_that_does_not_run_is_named():
    models = {"narrow": nn.Linear(7, CLASSES), "net": Net()}
    refused(CaptureError, r"narrow \(Linear\)", "arguments input", models=models)


def test_a_dear_model_does_not_earn_its_place():
    a, b, c = three()
    refused(StrategyError, r"net_0: .* MFLOPs, net_1: .* MFLOPs", "order by cost is net_2, net_1, net_0", models=[c, b, a])
    refused(StrategyError, "leave one out", models=[a, b, c], strategy=strategies.Cascade(max_head_share=0.05))
    given = eecompile([b, a, c], strategies.Cascade(order="given"), example_inputs=(X,))
    assert given.program.capture.models == ("net_0", "net_1", "net_2")
    by_cost = eecompile({"c": c, "a": a, "b": b}, strategies.Cascade(order="cost"), example_inputs=(X,))
    assert by_cost.program.capture.models == ("a", "b", "c")
    by_cost.set_thresholds(CLOSED)
    equal_bits(by_cost(X), c(X))


def test_the_same_model_twice_adds_nothing():
    a = three()[2]
    refused(StrategyError, "more than what same adds", models={"once": a, "same": a})


def test_other_strategies_take_one_model():
    refused(StrategyError, "takes one model", "3 models", strategy="branchy")


def test_options_that_do_not_fit():
    refused(StrategyError, "another length", strategy=strategies.Cascade(prepare=[None]))
    refused(StrategyError, "another length", strategy=strategies.Cascade(inputs=[None, None]))
    refused(StrategyError, "layers of one model", strategy=strategies.Cascade(exits=2))
    refused(StrategyError, "another length", prediction=["output", None])
    refused(StrategyError, "several models", models=three()[2], strategy=strategies.Cascade(prepare=[None]))
    refused(CaptureError, "two models or more", models=three()[:1])
    refused(CaptureError, "takes modules", models=[three()[0], "net"])
    refused(CaptureError, "cannot have this name", models=dict(zip(("a.b", "c", "d"), three(), strict=True)))
    refused(CaptureError, "no example input", example_inputs=None)
    refused(CaptureError, 'capture="export"', capture="blocks")
    compiled = eecompile(three(), "cascade", example_inputs=(X,))
    refused(StrategyError, "a cascade", "in one list", models=[three()[0], compiled])
    for wrong, part in (
        ({"order": "best"}, "check, cost, given"),
        ({"prepare": "f"}, "takes a list"),
        ({"prepare": [3]}, "int"),
    ):
        with pytest.raises(StrategyError, match=part):
            strategies.Cascade(**wrong)
    with pytest.raises(StrategyError, match="several models"):
        eecompile(three()[2], strategies.Branchy(exits="predictions"), example_inputs=(X,))


def test_inputs_by_name():
    """Each model takes the inputs that it names, or those that are given for it; the last one's output type is kept."""
    small, pair = Net().eval(), Pair(3, 16).eval()
    scale = torch.rand(6, 1) + 0.5
    call = {"x": X, "scale": scale}
    fast = eecompile([small, pair], "cascade", example_kwargs=call, prediction=["output", "scores"])
    with torch.no_grad():
        fast.set_thresholds(CLOSED)
        equal_bits(fast(**call), pair(**call))
        fast.set_thresholds(0.0)
        left = fast.run(**call)
        equal_bits(left.output["scores"], small(X))
        equal_bits(left.output["hidden"], small(X) + 1)  # computed from the scores, wherever they come from
        same_result(*both(fast, **call))
    renamed = strategies.Cascade(inputs=[{"x": "image"}, {"x": "image", "scale": "scale"}])
    call = {"image": X, "scale": scale}
    other = eecompile([small, pair], renamed, example_kwargs=call, prediction="scores")
    with torch.no_grad():
        other.set_thresholds(CLOSED)
        equal_bits(other(**call), pair(X, scale))
        equal_bits(other.original(**call), pair(X, scale))
    unnamed = {"models": [small, pair], "example_inputs": None, "prediction": "scores"}
    refused(
        StrategyError,
        "no model of the cascade takes this input",
        "extra",
        **unnamed,
        example_kwargs={"x": X, "scale": scale, "extra": X},
    )
    lost = strategies.Cascade(inputs=[["y"], None])
    refused(StrategyError, "names no input", "y", strategy=lost, **unnamed, example_kwargs={"x": X, "scale": scale})


def batches(rows: int = 600, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Labels that the last of `three()` knows by heart, the first mostly does not."""
    g = torch.Generator().manual_seed(seed)
    x = 2 * torch.randn(rows, 4, generator=g)
    with torch.no_grad():
        y = three()[2](x).argmax(1)
    return list(zip(x.split(100), y.split(100), strict=True))


def test_fit_has_nothing_to_train_but_the_models_themselves():
    models = three()
    before = {k: v.clone() for k, v in nn.ModuleList(models).state_dict().items()}
    fast = eecompile(models, "cascade", example_inputs=(X,))
    with pytest.raises(EecompileError, match="trunk=True"):
        fast.fit(batches(), progress=False)
    assert all(torch.equal(v, before[k]) for k, v in nn.ModuleList(models).state_dict().items())
    report = fast.fit(batches(), epochs=4, trunk=True, lr=1e-2, trunk_lr=1e-2, progress=False)
    assert report.rows[-1].loss < report.rows[0].loss
    assert all(torch.equal(v, before[k]) for k, v in nn.ModuleList(models).state_dict().items())
    trained = [fast.origin.captured.member(name).model for name in fast.origin.captured.order]
    for k, model in enumerate(trained):  # every model learns, through its own prediction
        assert any(not torch.equal(v, before[f"{k}.{n}"]) for n, v in model.state_dict().items())
    fast.set_thresholds(CLOSED)
    with torch.no_grad():
        equal_bits(fast(X), trained[-1].eval()(X))
        equal_bits(fast.full(X), models[-1].eval()(X))


def test_a_learned_criterion_trains_its_scores_alone(tmp_path):
    models = three()
    before = [p.clone() for m in models for p in m.parameters()]
    fast = eecompile(models, strategies.Cascade(criterion="learned"), example_inputs=(X,))
    fast.fit(batches(), epochs=2, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(before, (p for m in models for p in m.parameters()), strict=True))
    fast.set_thresholds(0.5)
    same_result(*both(fast, X))
    fast.save(tmp_path / "saved")
    same_result(load(tmp_path / "saved").run(X), fast.run(X))


def test_thresholds_carry_the_guarantee():
    """Calibrated on one part, the drop on another stays within what was promised."""
    fast = eecompile(three(), "cascade", example_inputs=(X,))
    fast.fit(batches(1500, 1), epochs=15, trunk=True, trunk_lr=1e-2, train_in_place=True, progress=False)
    report = fast.calibrate(batches(3000, 2), max_drop=0.05, delta=0.1, target="agreement")
    assert report.qualified
    measured = fast.evaluate(batches(3000, 3))
    assert measured.agreement >= 0.95
    assert measured.mean_cost == pytest.approx(report.expected_cost, abs=0.1)
    assert measured.mean_cost < 1.0


def test_a_model_that_is_slower_and_worse_is_refused_with_figures():
    """Labels that the middle model knows by heart: the last one costs more and is worse."""
    models = three()
    x = torch.cat([x for x, _ in batches(600, 5)])
    with torch.no_grad():
        y = models[1](x).argmax(1)
        right = [float((m(x).argmax(1) == y).float().mean()) for m in models]
    assert right[2] < right[1] == 1
    rows = list(zip(x.split(100), y.split(100), strict=True))
    fast = eecompile(models, "cascade", example_inputs=(X,))
    before = fast.thresholds.tolist(), fast.temperatures.tolist()
    for how in ({"max_drop": 0.1}, {"budget": 0.9}):
        with pytest.raises(CalibrationError) as caught:
            fast.calibrate(rows, **how)
        said = str(caught.value)
        assert "slower and worse than the one before it" in said
        assert f"net_2: accuracy {right[2]:.2%} at " in said
        assert "net_1: accuracy 100.00% at " in said
    assert (fast.thresholds.tolist(), fast.temperatures.tolist()) == before
    kept = eecompile(models, strategies.Cascade(order="given"), example_inputs=(X,))
    assert kept.calibrate(rows, budget=0.9).accuracy > right[2]


def test_stages_over_layers_of_one_model_must_fit(zoo):
    """Subsets of layers: places that do not exist, and heads that cost what they could save."""
    animal = zoo("hf_resnet")
    args, kwargs = animal.entry.inputs(4)
    with pytest.raises(StrategyError, match="no cut has this name"):
        again(animal.fast, strategies.Cascade(exits=["encoder.stages.9"]).over(1))
    with pytest.raises(StrategyError, match="head and decision cost"):
        again(animal.fast, strategies.Cascade(exits="every-block", max_head_share=1e-6).over(1))
    fast = again(animal.fast, strategies.Cascade(exits=(0.3, 0.6)).over(1))
    assert len(fast.exits) == 2
    fast.set_thresholds([0.2, CLOSED])
    same_result(*both(fast, *args, **kwargs))


def test_outputs_of_other_structure_are_no_obstacle_but_two_candidates_are():
    """The last model's structure is the cascade's; a model with two possible predictions must be told which."""
    pair = Pair(2, 16).eval()
    call = {"x": X, "scale": torch.ones(6, 1)}
    refused(StrategyError, "hidden", "scores", models=[pair, Net(4, 32).eval()], example_inputs=None, example_kwargs=call)
    fast = eecompile([pair, Net(4, 32).eval()], "cascade", example_kwargs=call, prediction=["scores", None])
    fast.set_thresholds(0.0)
    with torch.no_grad():
        equal_bits(fast(**call), pair(**call)["scores"])
    refused(StrategyError, "6 classes", "turned", models=[Turned(2).eval(), Net(4, 32).eval()])


def test_compiled_models_that_cannot_be_taken_apart(tmp_path):
    a, b, c = three()
    branchy = strategies.Branchy(exits=["layers"], criterion="margin", max_head_share=9.0)
    compiled = eecompile(b, branchy, example_inputs=(X,))
    refused(StrategyError, "margin in the compiled model, max_probability", "criterion='margin'", models=[a, compiled, c])
    compiled.save(tmp_path / "saved")
    refused(StrategyError, "loaded program", models=[a, load(tmp_path / "saved"), c])


def test_what_only_a_closed_model_reads_does_not_survive():
    """Two models share a stem, which the first has computed; the last does not need it."""
    stem = nn.Sequential(nn.Linear(4, 8), nn.Tanh())
    first = nn.Sequential(stem, nn.Linear(8, CLASSES))
    second = nn.Sequential(stem, nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, CLASSES))
    fast = eecompile([first, second, Net(4, 32)], "cascade", example_inputs=(X,))

    def survivors(open_exits: tuple[int, ...]) -> list[tuple[int | str, ...]]:
        return [v.shape for v in schedule(fast.program, open_exits).segments[0].outputs]

    assert survivors((0, 1)) == [("batch", 4), ("batch", 8)]
    assert survivors((0,)) == [("batch", 4)]
