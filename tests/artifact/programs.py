"""Programs to save: one for each kind of head, criterion and output that the format has to keep."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from eecompile import CompiledModule, heads, strategies
from tests.capture.nets import CLASSES, WIDTH, Answer, Net, made, rows
from tests.support import compiled as eecompile


class Wide(nn.Module):
    """A head of the user's own; the process that loads the program knows nothing of it."""

    def __init__(self, classes: int = CLASSES) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(WIDTH, 12), nn.Linear(12, classes)

    def forward(self, h: Tensor) -> Tensor:
        return self.out(torch.tanh(self.hidden(h)))


class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.blocks = nn.Sequential(
            *(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()) for _ in range(4))
        )
        self.drop, self.out = nn.Dropout(0.2), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.drop(self.blocks(self.stem(x)).mean((2, 3))))


class Named(Net):
    def forward(self, x: Tensor) -> Answer:
        h = self.trunk(x)
        return Answer(self.out(h), h.mean(-1))


class Tree(Net):
    def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, object]:
        h = self.trunk(x * scale)
        return {"logits": self.out(h), "rest": [h.sum(-1), None, 3, True, 0.5]}


def bert() -> CompiledModule:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16, num_labels=CLASSES,
    )  # fmt: skip
    model = BertForSequenceClassification(config).eval()
    return eecompile(model, strategies.MeBert(exits=2), example_kwargs={"input_ids": ids(4), "attention_mask": mask(4)})


def ids(count: int) -> Tensor:
    return torch.randint(1, 50, (count, 8), generator=torch.Generator().manual_seed(7))


def mask(count: int) -> Tensor:
    found = torch.ones(count, 8, dtype=torch.int64)
    found[0, 5:] = 0
    return found


def net(**options: object) -> CompiledModule:
    return eecompile(made(Net), strategies.Branchy(exits=2, **options), example_inputs=(rows(4),))


def conv(**options: object) -> CompiledModule:
    strategy = strategies.Branchy(exits=2, **options)
    return eecompile(made(Conv), strategy, example_inputs=(rows(4, 1, 8, 8),))


PROGRAMS: dict[str, Callable[[], CompiledModule]] = {
    "bert": bert,
    "conv": conv,
    "joint": lambda: conv(trunk=True),
    "custom": lambda: net(head=Wide()),
    "factory": lambda: net(head=lambda site: heads.MLPHead(site, hidden=5)),
    "learned": lambda: net(criterion="learned"),
    "patience": lambda: eecompile(
        made(Net), strategies.MeBert(head="linear", criterion="patience"), example_inputs=(rows(4),)
    ),
    "shared": lambda: net(head="shared"),
    "tree": lambda: eecompile(
        made(Tree), "branchy", example_inputs=(rows(4),), example_kwargs={"scale": 0.5}, prediction="logits"
    ),
}


def inputs(name: str, count: int = 6) -> dict[str, Tensor]:
    if name == "bert":
        return {"input_ids": ids(count), "attention_mask": mask(count)}
    return {"x": rows(count, 1, 8, 8, seed=9) if name in ("conv", "joint") else rows(count, seed=9)}


def adjusted(fast: CompiledModule, name: str) -> CompiledModule:
    """With temperatures of its own, and thresholds that let some rows leave at every exit."""
    count = len(fast.exits)
    fast.set_temperatures([1.5 + k for k in range(count + 1)])
    confidences = fast.observe(**inputs(name)).confidences
    if name == "patience":  # leaves once two exits agree
        fast.set_thresholds(0.75)
        return fast
    fast.set_thresholds([float(c.sort().values[-3:-1].mean()) for c in confidences[:-1]])
    return fast
