"""What the examples share apart from data: their models, trunks that are trained once, options and results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from examples import _common, _registry, datasets, models

ROOT = Path(__file__).parents[2]
DatasetError = _registry.DatasetError


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (models.DigitsNet(), (2, 1, 8, 8)),
        (models.LeNet(), (2, 1, 28, 28)),
        (models.resnet20(), (2, 3, 32, 32)),
        (models.resnet8(), (2, 3, 32, 32)),
    ],
)
def test_models_give_logits(model: nn.Module, shape: tuple[int, ...]) -> None:
    assert model.eval()(torch.randn(shape)).shape == (2, 10)


def test_resnet20_has_the_size_of_the_paper() -> None:
    assert sum(p.numel() for p in models.resnet20().parameters()) == 272_474  # 269,722 and two projections
    assert sum(isinstance(m, models.BasicBlock) for m in models.resnet20().modules()) == 9


def test_minilm_classifier_is_fresh_and_seeded(cache: Path) -> None:
    folder = datasets.minilm(standin=True)
    first, second, third = (models.minilm_classifier(folder, 3, seed) for seed in (0, 0, 1))
    assert torch.equal(first.classifier.weight, second.classifier.weight)
    assert not torch.equal(first.classifier.weight, third.classifier.weight)
    assert torch.equal(first.bert.embeddings.word_embeddings.weight, third.bert.embeddings.word_embeddings.weight)
    out = first.eval()(**{k: v for k, v in datasets.tokens("val", 2, standin=True).items() if k != "labels"})
    assert out.logits.shape == (2, 3)


def test_trunk_is_trained_once_and_kept(cache: Path) -> None:
    first = _common.lenet_trunk(quick=True)
    assert first.accuracy > 0.9
    assert first.seconds > 0
    assert first.path.exists()
    assert first.to_dict()["recipe"]["name"] == "lenet-mnist-quick"
    assert not list(first.path.parent.glob("*.resume"))
    second = _common.lenet_trunk(quick=True)
    assert second.to_dict() == first.to_dict()
    for key, value in first.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[key])
    assert _common.lenet_trunk(quick=True, seed=1).path != first.path
    first.path.write_bytes(b"not a trunk")
    with pytest.raises(DatasetError, match="is not a trunk of these settings"):
        _common.lenet_trunk(quick=True)


class Stop(Exception):
    """The plug is pulled."""


@pytest.mark.parametrize("stop_at", [1, 5, 8, 13])
def test_training_resumes_as_if_unbroken(cache: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int) -> None:
    images, labels = datasets.load("cifar10", "train", 60, standin=True).tensors

    def build() -> nn.Module:
        torch.manual_seed(0)
        flat = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(16 * 8 * 8, 10))
        return nn.Sequential(nn.Conv2d(3, 16, 3, 4, 1), nn.BatchNorm2d(16), *flat)

    def recipe(name: str) -> _common.Recipe:
        return _common.Recipe(name, 3, 12, 0.1, "sgd", moved=4, mirrored=True, small=((1, 32),), channels_last=True)

    whole, broken = build(), build()
    _common.fit_trunk(whole, images, labels, recipe("whole"))
    steps, augment = 0, datasets.augment

    def failing(batch: torch.Tensor, *, pixels: int, mirrored: bool) -> torch.Tensor:
        nonlocal steps
        if steps == stop_at:
            raise Stop
        steps += 1
        return augment(batch, pixels=pixels, mirrored=mirrored)

    monkeypatch.setattr(datasets, "augment", failing)
    with pytest.raises(Stop):
        _common.fit_trunk(broken, images, labels, recipe("broken"), save_every_s=0.0)
    monkeypatch.setattr(datasets, "augment", augment)
    broken = nn.Sequential(*build())
    torch.manual_seed(99)
    _, curve = _common.fit_trunk(broken, images, labels, recipe("broken"))
    assert len(curve) == 3 and all(row["loss"] > 0 for row in curve)
    for (name, a), b in zip(whole.state_dict().items(), broken.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_options_and_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    try:
        options = _common.parse("Doc.\n\nMore.", ["--quick", "--seed", "3", "--threads", "1", "--out", str(tmp_path)])
        with pytest.raises(SystemExit):
            _common.parse(None, ["--threads", "0"])
    finally:
        torch.set_num_threads(threads)
    assert "--threads is 0, wanted at least 1" in capsys.readouterr().err
    record = _common.Record("thing", options)
    record.note(rows_of_data=7)
    record.row("it", accuracy=0.5)
    path = record.write()
    assert path == tmp_path / "thing-quick.json"
    found = json.loads(path.read_text())
    assert found["command"] == "python -m examples.thing --quick --seed 3 --threads 1"
    assert found["rows_of_data"] == 7
    assert found["rows"] == [{"what": "it", "accuracy": 0.5}]
    assert torch.__version__.startswith(found["machine"]["versions"]["torch"])


def test_accuracy_counts_and_refuses_an_empty_loader() -> None:
    model = nn.Linear(2, 2, bias=False)
    nn.init.eye_(model.weight)
    batches = [(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 1]))]
    assert _common.accuracy(model, iter(batches)) == 0.5
    assert model.training
    with pytest.raises(DatasetError, match="no batch"):
        _common.accuracy(model, iter([]))
