"""Outputs keep their type: containers, named tuples, dataclasses of transformers, numbers and None among them."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from eecompile import ArtifactError, CaptureError, StrategyError, load, strategies
from tests.capture.nets import WIDTH, Answer, Net, compiled, made, rows
from tests.support import close, equal_bits
from tests.support import compiled as eecompile


class Tree(Net):
    def forward(self, x: Tensor) -> dict[str, object]:
        h = self.trunk(x)
        return {"logits": self.out(h), "aux": [h, (h.sum(-1), None)], "version": 3, "name": "tree"}


class Named(Net):
    def forward(self, x: Tensor) -> Answer:
        h = self.trunk(x)
        return Answer(self.out(h), h.mean(-1))


class Two(Net):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.trunk(x)
        return self.out(h), -self.out(h)


class OneScore(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, 0]


class NamedLogit(Net):
    """One score [B, 1] next to hidden states, or without its last axis."""

    def __init__(self, flat: bool = False) -> None:
        super().__init__()
        self.flat = flat

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        logit = super().forward(x)[:, :1]
        return {"hidden": self.trunk(x), "logit": logit[:, 0] if self.flat else logit}


class NoScores(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).argmax(-1)


class Nothing(Net):
    def forward(self, x: Tensor) -> int:
        self.trunk(x)
        return 3


class Sized(Net):
    """Numbers computed from the sizes of the inputs beside the scores."""

    def forward(self, ids: Tensor) -> dict[str, object]:
        h = self.trunk(torch.nn.functional.one_hot(ids, WIDTH).float().mean(1))
        b, s = ids.shape
        return {"rows": b, "scores": self.out(h), "sizes": [s, b // 2, b * s + 1, s % 3], "share": s / 4}


class Asked(Net):
    def forward(self, x: Tensor) -> tuple[Tensor, int, bool]:
        return super().forward(x), x.shape[0], x.shape[0] > 3


class Counted(Net):
    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        return super().forward(x), int((x[0] > 0).sum().item())


def test_numbers_computed_from_sizes_are_those_of_the_call(tmp_path):
    ids = torch.arange(48).view(6, 8) % WIDTH
    model = made(Sized)
    fast, other = compiled(model, ids), compiled(made(Asked), rows(4))
    fast.save(tmp_path / "program")
    back = load(tmp_path / "program")
    back.set_thresholds(2.0)
    for given in (ids[:5, :7], ids, ids[:1, :6]):
        want = model(given)
        for one in (fast, back):
            got = one(given)
            close(got.pop("scores"), want["scores"])
            assert got == {k: v for k, v in want.items() if k != "scores"}
            assert one.full(given)["sizes"] == want["sizes"]
    assert (other(rows(3))[1:], other(rows(4))[1:]) == ((3, False), (4, True))
    with pytest.raises(ArtifactError, match="whether its sizes meet a condition"):
        other.save(tmp_path / "other")
    fast.set_thresholds(0.0)  # all rows leave at the first exit
    assert fast(ids[:5])["sizes"] == model(ids[:5])["sizes"]


def test_a_number_that_depends_on_data_is_refused():
    with pytest.raises(CaptureError, match="data-dependent expression"):
        compiled(made(Counted), rows(4))


def test_a_tree_of_outputs():
    model = made(Tree)
    fast = compiled(model, rows(4), prediction="logits")
    x = rows(3)
    with torch.no_grad():
        got, want = fast(x), model(x)
    equal_bits(got, want)
    assert list(got) == list(want)
    assert got["aux"][1][1] is None
    assert type(got["aux"][1]) is tuple
    assert (got["version"], got["name"]) == (3, "tree")


def test_leaves_that_a_row_never_reached_are_marked():
    fast = compiled(made(Tree), rows(4), prediction="logits", closed=False)
    fast.set_thresholds(0.0)
    got = fast(rows(3))
    assert bool(torch.isfinite(got["logits"]).all())
    assert bool(got["aux"][0].isnan().all())


def test_a_named_tuple_stays_one():
    model = made(Named)
    fast = compiled(model, rows(4))  # only one output has the shape of scores
    with torch.no_grad():
        got = fast(rows(3))
        equal_bits(got, model(rows(3)))
    assert isinstance(got, Answer)
    assert fast.prediction_of(got) is got.scores


def test_an_output_class_of_transformers_stays_one():
    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=50, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32,
            max_position_embeddings=16, num_labels=3,
        )
    ).eval()  # fmt: skip
    ids = torch.randint(0, 50, (4, 8), generator=torch.Generator().manual_seed(0))
    fast = compiled(model, strategy="mebert", example_kwargs={"input_ids": ids, "output_hidden_states": True})
    with torch.no_grad():
        got, want = fast(input_ids=ids[:3]), model(input_ids=ids[:3], output_hidden_states=True)
    assert type(got) is type(want)
    close(got.logits, want.logits, 1e-6)
    assert len(got.hidden_states) == 4
    assert got.loss is None


def test_a_key_value_cache_in_the_output_says_how_to_leave_it_out():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=16)).eval()
    ids = torch.randint(0, 50, (4, 8), generator=torch.Generator().manual_seed(0))
    with pytest.raises(CaptureError, match="use_cache=False"):  # the causal models of the zoo are called that way
        eecompile(model, example_kwargs={"input_ids": ids}, prediction="logits")


def test_several_possible_predictions_are_listed():
    with pytest.raises(StrategyError) as caught:
        eecompile(made(Two), example_inputs=(rows(4),))
    text = str(caught.value)
    assert "several outputs could be the prediction" in text
    assert "0: [0]: float32[batch, 3]; 1: [1]: float32[batch, 3]" in text
    assert "pass prediction=" in text
    fast = compiled(made(Two), rows(4), prediction=1)
    with torch.no_grad():
        equal_bits(fast(rows(3)), made(Two)(rows(3)))
    assert fast.program.prediction.index == 1


@pytest.mark.parametrize(
    ("kind", "prediction", "said"),
    [
        (Tree, "logit", ["names no output", "did you mean logits", "got:    'logit'"]),
        (Tree, 7, ["names no output", "0: "]),
        (Tree, "aux[1][0]", ["must be class scores per row", "aux[1][0]: float32[batch]"]),
        (OneScore, None, ["no output looks like class scores", "scores.unsqueeze(-1)"]),
        (OneScore, "output", ["must be class scores per row", "scores.unsqueeze(-1)"]),
        (
            partial(NamedLogit, flat=True),
            None,
            ["must be class scores per row", "logit: float32", "unsqueeze"],
        ),
        (NoScores, None, ["no output looks like class scores", "int64[batch]"]),
    ],
)
def test_a_prediction_that_is_none(kind, prediction, said):
    with pytest.raises(StrategyError) as caught:
        eecompile(made(kind), example_inputs=(rows(4),), prediction=prediction)
    for text in said:
        assert text in str(caught.value)


def test_one_output_named_logit_is_the_prediction():
    fast = compiled(made(NamedLogit), rows(4))
    assert fast.program.signature.outputs[fast.program.prediction.index].path == "logit"


def test_a_model_that_returns_no_tensor():
    with pytest.raises(CaptureError, match="no tensor"):
        eecompile(made(Nothing), example_inputs=(rows(4),))


class Residual(nn.Module):
    """[B, 8] -> [B, 4] in four repeated blocks, and whatever end."""

    def __init__(self, end: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(4))
        self.out, self.end = nn.Linear(8, 4), end

    def forward(self, x: Tensor) -> Any:
        for block in self.blocks:
            x = x + block(x)
        return self.end(self.out(x))


@pytest.mark.parametrize("end", ["softmax", "log_softmax", "sigmoid", None])
def test_probabilities_of_a_model_captured_as_blocks_are_refused(end: str | None) -> None:
    ends: dict[str | None, Any] = {
        "softmax": lambda z: z.softmax(-1),
        "log_softmax": lambda z: z.log_softmax(-1),
        "sigmoid": torch.sigmoid,
        None: lambda z: z,
    }
    model, x = Residual(ends[end]).eval(), torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    if end is None:
        assert eecompile(model, strategies.Branchy(exits=1), example_inputs=(x,), capture="blocks").exits
        return
    with pytest.raises(StrategyError, match="looks like probabilities"):
        eecompile(model, strategies.Branchy(exits=1), example_inputs=(x,), capture="blocks")
