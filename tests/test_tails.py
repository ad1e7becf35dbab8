"""What rows that left early get where the prediction is no logits, and next to it: what the model makes of logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eecompile import CompiledModule, StrategyError, eecompile, load, strategies
from tests.support import equal_bits, tensors

Make = Callable[[Tensor, Tensor], Any]
ENDS: dict[str, Make] = {
    "softmax": lambda z, x: z.softmax(-1),
    "log_softmax": lambda z, x: torch.log_softmax(z, 1),
    "sigmoid": lambda z, x: torch.sigmoid(z),
    "sigmoid in place": lambda z, x: z.sigmoid_(),
    "softmax, detached": lambda z, x: z.softmax(-1).detach().clone(),
    "probabilities and class": lambda z, x: {"logits": z, "probs": z.softmax(-1), "label": z.argmax(-1)},
    "class alone next to them": lambda z, x: (z, z.argmax(-1)),
    "softmax and class": lambda z, x: {"logits": z.softmax(-1), "label": z.argmax(-1)},
    "top two": lambda z, x: (z, *z.topk(2)),
    "margin, masked by the input": lambda z, x: {"logits": z, "kept": z.masked_fill(x[:, :4] > 0, -1.0).amax(-1)},
    "scaled by a constant": lambda z, x: {"logits": z, "scaled": (z * 2).exp().sum(1, keepdim=True)},
}


class Ending(nn.Module):
    def __init__(self, end: Make) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = [m for _ in range(3) for m in (nn.Linear(8, 8), nn.ReLU())]
        self.body, self.fc, self.end = nn.Sequential(*layers), nn.Linear(8, 4), end

    def forward(self, x: Tensor) -> Any:
        return self.end(self.fc(self.body(x)), x)


def compiled(end: str) -> tuple[CompiledModule, nn.Module, Tensor]:
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(3))
    model = Ending(ENDS[end]).eval()
    several = not end.startswith(("softmax", "log", "sigmoid")) or end == "softmax and class"
    key = ("logits" if not end.startswith(("class", "top")) else 0) if several else None
    fast = eecompile(model, strategies.Branchy(exits=2, criterion="margin"), example_inputs=x, prediction=key)
    return fast, model, x


@pytest.mark.parametrize("end", ENDS)
def test_early_rows_get_what_the_model_makes_of_logits(end: str, tmp_path: Path) -> None:
    fast, model, x = compiled(end)
    equal_bits(fast(x), model(x))
    equal_bits(fast.full(x), model(x))
    seen = fast.observe(x)
    assert seen.outputs is not None and seen.confidences is not None
    thresholds = [float((c.sort().values[7] + c.sort().values[8]) / 2) for c in seen.confidences[:-1]]
    fast.set_thresholds(thresholds)
    fast.executor = "reference"
    result = fast.run(x)
    assert result.exit_index.bincount(minlength=3).gt(0).all()
    taken = torch.stack(list(fast.observe(x).outputs or ()))[result.exit_index, torch.arange(len(x))]
    want = ENDS[end](taken.clone(), x)
    for got, wanted in zip(tensors(result.output), tensors(want), strict=True):
        assert not got.isnan().any()
        torch.testing.assert_close(got, wanted)
    fast.save(tmp_path / "program")
    for other in (fast, load(tmp_path / "program")):
        for executor in ("compact", "simulate"):
            other.executor = executor
            again = other.run(x)
            assert torch.equal(again.exit_index, result.exit_index)
            for got, wanted in zip(tensors(again.output), tensors(result.output), strict=True):
                torch.testing.assert_close(got, wanted)
            for got, wanted in zip(tensors(other(x[:5])), tensors(again.output), strict=True):
                torch.testing.assert_close(got, wanted[:5])


@pytest.mark.parametrize("end", ["softmax", "log_softmax", "sigmoid"])
def test_losses_and_confidences_use_the_logits(end: str) -> None:
    fast, model, x = compiled(end)
    fast.train()
    result = fast.run(x)
    assert result.outputs is not None and result.confidences is not None
    torch.testing.assert_close(ENDS[end](result.outputs[-1].clone(), x), model(x))
    top = result.outputs[-1].softmax(-1).topk(2).values
    margin = top[:, 0] - top[:, 1]
    if end == "sigmoid":  # each score is a yes or no of its own; the least sure of them counts
        margin = (2 * result.outputs[-1].sigmoid() - 1).abs().amin(1)
    torch.testing.assert_close(result.confidences[-1], margin)
    fast.train_trunk = True
    trained = fast.run(x)
    torch.testing.assert_close(trained.outputs[-1], result.outputs[-1])  # type: ignore[index]


def test_a_value_that_the_prediction_does_not_give_is_unknown_and_listed() -> None:
    x = torch.randn(8, 8)

    class Hidden(Ending):
        def forward(self, x: Tensor) -> Any:
            h = self.body(x)
            z = self.fc(h)
            return {"logits": z, "hidden": h, "probs": z.softmax(-1), "weighed": z @ self.fc.weight}

    fast = eecompile(Hidden(ENDS["softmax"]).eval(), strategies.Branchy(exits=2), example_inputs=x, prediction="logits")
    fast.set_thresholds(0.0)
    found = fast(x)
    assert found["hidden"].isnan().all()
    assert found["weighed"].isnan().all()  # computed with the model's weights: not known from logits alone
    assert not found["probs"].isnan().any()
    listed = {o["output"]: o["known_from"] for o in fast.explain().to_dict()["unknown_early"]}
    assert listed == {"hidden": "exit_1", "weighed": "model"}
    assert "NaN for rows that exit before model" in str(fast)


@pytest.mark.parametrize(
    "end", [lambda z: z.softmax(-1).log(), lambda z: z.exp() / z.exp().sum(-1, keepdim=True)], ids=["log", "quotient"]
)
def test_probabilities_by_an_end_that_is_not_recognised_are_refused(end: Any) -> None:
    class Odd(Ending):
        def forward(self, x: Tensor) -> Tensor:
            return end(self.fc(self.body(x)))  # type: ignore[no-any-return]

    with pytest.raises(StrategyError, match="looks like probabilities"):
        eecompile(Odd(ENDS["softmax"]).eval(), strategies.Branchy(exits=2), example_inputs=torch.randn(8, 8))


def test_outputs_that_are_computed_from_the_inputs_are_known() -> None:
    class Beside(Ending):
        def forward(self, x: Tensor) -> Any:
            scaled = x * 2
            h = self.body(scaled)
            found = {"logits": self.fc(h), "scaled": scaled, "mean": x.mean(1), "arg": x.argmax(1), "cut": x[:, :2]}
            return {**found, "mixed": found["logits"] + x[:, :1], "hidden": h}

    x = torch.randn(8, 8)
    model = Beside(ENDS["softmax"]).eval()
    fast = eecompile(model, strategies.Branchy(exits=2), example_inputs=x, prediction="logits")
    fast.set_thresholds(0.0)
    for executor in ("compact", "reference"):
        fast.executor = executor
        found, wanted = fast(x), model(x)
        for name in ("scaled", "mean", "arg", "cut"):
            equal_bits(found[name], wanted[name])
        torch.testing.assert_close(found["mixed"], found["logits"] + x[:, :1])
        assert found["hidden"].isnan().all()
