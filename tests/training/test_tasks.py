"""Tasks that are not one class of several: found from the labels, or named with the way that fits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from eecompile import CalibrationError, CompiledModule, EecompileError, eecompile, strategies

X = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
SETS = (torch.arange(128).view(32, 4) % 3 == 0).float()


def compiled(classes: int) -> CompiledModule:
    torch.manual_seed(0)
    layers = [m for _ in range(3) for m in (nn.Linear(8, 8), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Linear(8, classes)).eval()
    return eecompile(model, strategies.Branchy(exits=2), example_inputs=X)


@pytest.mark.parametrize(
    ("classes", "labels", "said"),
    [
        (4, SETS, "binary_cross_entropy_with_logits"),
        (4, SETS.bool(), "binary_cross_entropy_with_logits"),
        (1, SETS[:, :1], "binary_cross_entropy_with_logits"),
        (4, F.one_hot(torch.arange(32) % 4).float(), "argmax"),
        (4, torch.randn(32, 4), "pass loss= to fit"),
    ],
    ids=["several labels", "several bool labels", "yes or no", "one-hot", "regression"],
)
def test_the_hint_fits_the_labels(classes: int, labels: torch.Tensor, said: str) -> None:
    with pytest.raises(EecompileError, match="labels have the wrong dtype") as caught:
        compiled(classes).fit([(X, labels)], epochs=1, progress=False)
    assert said in str(caught.value)
    assert "loss=" in str(caught.value)


@pytest.mark.parametrize("classes", [1, 4], ids=["one score", "trained with loss="])
def test_agreement_of_the_largest_score_is_refused_where_it_is_no_answer(classes: int) -> None:
    fast = compiled(classes)
    if classes > 1:
        fast.fit([(X, SETS)], epochs=1, loss=F.binary_cross_entropy_with_logits, progress=False)
    with pytest.raises(CalibrationError, match="agreement compares the class of the largest score"):
        fast.calibrate([(X, None)], target="agreement")

    def same_set(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return ((z > 0) == (y > 0)).all(-1).double()

    fast.calibrate([(X, fast.full(X))], metric=same_set, max_drop=0.0, delta=None)
    assert same_set(fast(X), fast.full(X)).all()


@pytest.mark.parametrize("end", [torch.sigmoid, lambda z: z.sigmoid_(), lambda z: torch.sigmoid(z).clone()])
def test_agreement_of_a_model_that_ends_in_a_sigmoid_is_refused(end: Any) -> None:
    class Labels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layers = nn.Sequential(*[m for _ in range(3) for m in (nn.Linear(8, 8), nn.ReLU())], nn.Linear(8, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = end(self.layers(x))
            return found

    fast = eecompile(Labels().eval(), strategies.Branchy(exits=1), example_inputs=X)
    with pytest.raises(CalibrationError, match="ends in a sigmoid"):
        fast.calibrate([(X, None)], target="agreement")


def test_classes_still_agree() -> None:
    fast = compiled(4)
    fast.fit([(X, torch.arange(32) % 4)], epochs=1, progress=False)
    fast.calibrate([(X, None)], target="agreement", max_drop=0.0, delta=None)
    assert torch.equal(fast(X).argmax(1), fast.full(X).argmax(1))
