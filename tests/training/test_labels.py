"""Training loops of others: transformers.Trainer with its defaults, labels among the arguments, accelerate."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eecompile import EecompileError, eecompile, load, strategies
from eecompile.module import CompiledModule
from tests.support import Fingerprint, equal_bits

transformers = pytest.importorskip("transformers")
X = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(16) % 4


def rows(count: int, length: int = 6) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(count)
    mask = torch.ones(length, dtype=torch.long)
    return [
        {"input_ids": torch.randint(1, 30, (length,), generator=generator), "attention_mask": mask, "labels": i % 3}
        for i in range(count)
    ]


def bert() -> tuple[CompiledModule, nn.Module]:
    torch.manual_seed(0)
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=30, num_labels=3, max_position_embeddings=16, **small)
    model = transformers.BertForSequenceClassification(config).eval()
    example = {n: torch.stack([r[n] for r in rows(4)]) for n in ("input_ids", "attention_mask")}
    return eecompile(model, strategies.MeBert(exits=1), example_kwargs=example), model


def trainer(fast: CompiledModule, directory: Path, **options: Any) -> Any:
    given = {"per_device_train_batch_size": 4, "num_train_epochs": 2, "save_strategy": "epoch", "learning_rate": 1e-2}
    quiet = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_strategy": "no"}
    arguments = transformers.TrainingArguments(output_dir=str(directory), **{**given, **quiet, **options})
    return transformers.Trainer(model=fast, args=arguments, train_dataset=rows(8), eval_dataset=rows(6))


def test_trainer_with_its_defaults(tmp_path: Path) -> None:
    fast, model = bert()
    before, heads = Fingerprint.of(model), [p.clone() for p in fast.head_parameters()]
    again = copy.deepcopy(fast)
    made = trainer(fast, tmp_path)
    assert made.label_names == ["labels"]
    made.train()
    assert not all(torch.equal(a, b) for a, b in zip(heads, fast.head_parameters(), strict=True))
    assert before.changes(model) == []
    fast.set_thresholds(0.0)
    found = made.predict(rows(6))
    batch = {n: torch.stack([r[n] for r in rows(6)]) for n in ("input_ids", "attention_mask")}
    want = fast.eval()(**batch).logits
    torch.testing.assert_close(torch.from_numpy(found.predictions), want.detach())
    loss = F.cross_entropy(want, torch.tensor([r["labels"] for r in rows(6)])).item()
    assert found.metrics["test_loss"] == pytest.approx(loss, abs=1e-5)
    assert made.evaluate()["eval_loss"] == pytest.approx(loss, abs=1e-5)
    trainer(again, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, t in fast.state_dict().items():
        if "threshold" not in name:
            torch.testing.assert_close(again.state_dict()[name], t)


def test_the_arguments_of_the_model_are_named(tmp_path: Path) -> None:
    fast, model = bert()
    assert list(inspect.signature(fast.forward).parameters) == list(inspect.signature(model.forward).parameters)
    fast.save(tmp_path / "program")
    assert inspect.signature(load(tmp_path / "program").forward) == inspect.signature(fast.forward)
    plain = eecompile(Outputs(lambda z: z).eval(), strategies.Branchy(exits=1), example_inputs=X)
    assert str(inspect.signature(plain.forward)) == "(x=None, *, labels=None)"
    assert callable(plain.forward)
    assert plain.forward.__name__ == "forward"


class Outputs(nn.Module):
    """[B, 8] to what `out` makes of logits [B, 4]."""

    def __init__(self, out: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.out = out
        self.layers = nn.Sequential(*[m for _ in range(3) for m in (nn.Linear(8, 8), nn.ReLU())], nn.Linear(8, 4))

    def forward(self, x: Tensor) -> Any:
        return self.out(self.layers(x))


OUTPUTS: dict[str, Any] = {
    "tensor": (lambda z: z, lambda o: (o[0], o[1])),
    "tuple": (lambda z: (z, z.mean(-1)), lambda o: (o[0], o[1])),
    "dict": (lambda z: {"scores": z}, lambda o: (o["loss"], o["scores"])),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_the_loss_comes_first(name: str) -> None:
    make, parts = OUTPUTS[name]
    fast = eecompile(Outputs(make).eval(), strategies.Branchy(exits=1), example_inputs=X, prediction=0)
    with torch.no_grad():
        loss, logits = parts(fast(X, labels=Y))
        assert loss.item() == pytest.approx(F.cross_entropy(logits, Y).item())
        equal_bits(logits, fast.prediction_of(fast(X)))
    fast.train()
    loss, _ = parts(fast(X, labels=Y))
    torch.testing.assert_close(loss, fast.loss(fast.run(X), Y))
    loss.backward()
    assert any(p.grad is not None and bool(p.grad.any()) for p in fast.head_parameters())


def test_labels_that_the_model_takes_go_to_the_model() -> None:
    class Takes(Outputs):
        def forward(self, x: Tensor, labels: Tensor) -> Tensor:  # type: ignore[override]
            out: Tensor = self.layers(x) + labels[:, None]
            return out

    model = Takes(None).eval()
    fast = eecompile(model, strategies.Branchy(exits=1), example_kwargs={"x": X, "labels": Y.float()})
    equal_bits(fast(x=X, labels=Y.float()).detach(), model(X, Y.float()).detach())
    assert list(inspect.signature(fast.forward).parameters) == ["x", "labels"]


def test_wrong_labels_are_named() -> None:
    fast = eecompile(Outputs(lambda z: z).eval(), strategies.Branchy(exits=1), example_inputs=X)
    with pytest.raises(EecompileError, match="labels out of range"):
        fast(X, labels=Y + 4)
