"""The models of the benchmarks, their inputs, and thresholds that force an exit mix by real decisions.

Weights and heads are random: they decide which row leaves where, not how long anything takes, and the mix is set by
thresholds between the confidences that the heads really give. No model hub is reached.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import transformers as hf
from torch import Tensor, nn

from eecompile import CompiledModule, eecompile
from eecompile.strategies import Branchy, MeBert, Strategy
from examples.models import LeNet, resnet20

CPU = torch.device("cpu")
CLOSED = 2.0
NO_EXIT = 1.0  # open exits, and no head of random weights is that sure
EXAMPLE_ROWS = 4


@dataclass
class Subject:
    """A model, one call of it, and the same model compiled.

    Attributes:
        name: With the sizes of the call, as tables show it.
        inputs: Keyword arguments of the call.
    """

    name: str
    model: nn.Module
    inputs: Mapping[str, Tensor]
    strategy: Strategy
    device: torch.device = CPU
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.model.eval().to(self.device)
        self.inputs = {k: v.to(self.device) for k, v in self.inputs.items()}

    def compile(self, **options: Any) -> CompiledModule:
        """A new compilation, with a few rows as the example."""
        fast = eecompile(self.model, self.strategy, example_kwargs=self.example(), **self.options, **options)
        fast.to(self.device)
        return fast

    def example(self) -> dict[str, Tensor]:
        """Different rows, also where the call has only one."""
        made = torch.Generator().manual_seed(1)
        out = {}
        for name, t in self.inputs.items():
            rows = t[:EXAMPLE_ROWS]
            if len(rows) < EXAMPLE_ROWS:
                rows = torch.randn((EXAMPLE_ROWS, *t.shape[1:]), generator=made).to(t)
            out[name] = rows
        return out

    @cached_property
    def fast(self) -> CompiledModule:
        return self.compile()

    @property
    def size(self) -> int:
        return len(next(iter(self.inputs.values())))

    def original(self) -> Any:
        return self.model(**self.inputs)

    def compiled(self) -> Any:
        return self.fast(**self.inputs)


def bert(
    batch: int, length: int, exits: int | Sequence[str] | Strategy, device: torch.device = CPU, padded: bool = False
) -> Subject:
    """BERT-base with two classes, and exits or any strategy.

    `padded` rows are between half and all of the length, and come with their mask.
    """
    torch.manual_seed(0)
    config = hf.BertConfig(num_labels=2)
    made = torch.Generator().manual_seed(2)
    inputs = {"input_ids": torch.randint(1000, config.vocab_size, (batch, length), generator=made)}
    if padded:
        sizes = torch.randint(length // 2, length + 1, (batch, 1), generator=made)
        sizes[0] = length
        inputs["attention_mask"] = (torch.arange(length) < sizes).long()
    strategy = exits if isinstance(exits, Strategy) else MeBert(exits=exits if isinstance(exits, int) else tuple(exits))
    return Subject(f"BERT-base {batch} x {length}", hf.BertForSequenceClassification(config), inputs, strategy, device)


def resnet(batch: int, exits: int | Strategy, device: torch.device = CPU) -> Subject:
    """ResNet-20 on 32 x 32 images, its batch norms with statistics that are not those of a fresh layer."""
    torch.manual_seed(0)
    model = resnet20()
    made = torch.Generator().manual_seed(2)
    with torch.no_grad():
        model.train()(torch.randn(64, 3, 32, 32, generator=made))
    inputs = {"x": torch.randn(batch, 3, 32, 32, generator=made)}
    strategy = exits if isinstance(exits, Strategy) else Branchy(exits=exits)
    return Subject(f"ResNet-20 at {batch}", model, inputs, strategy, device)


def lenet(batch: int, exits: int | Strategy, device: torch.device = CPU) -> Subject:
    torch.manual_seed(0)
    inputs = {"x": torch.randn(batch, 1, 28, 28, generator=torch.Generator().manual_seed(2))}
    strategy = exits if isinstance(exits, Strategy) else Branchy(exits=exits)
    return Subject(f"LeNet at {batch}", LeNet(), inputs, strategy, device)


def spread_out(subject: Subject, factor: float = 10.0) -> None:
    """Heads with larger weights: fresh ones say next to nothing, so all rows are as unsure as one another."""
    with torch.no_grad():
        for p in subject.fast.head_parameters():
            if p.dim() > 1:
                p.mul_(factor)


def force_mix(subject: Subject, leaving: Sequence[int]) -> list[float]:
    """Sets thresholds so that just so many rows leave at each exit, by what the heads say of them.

    Raises:
        ValueError: Two rows are equally sure where the line would be drawn.
    """
    fast = subject.fast
    confidences = fast.observe(**subject.inputs).confidences
    assert confidences is not None
    inside = torch.arange(subject.size)
    thresholds = []
    for count, confidence in zip(leaving, confidences[:-1], strict=True):
        sure, order = confidence.cpu()[inside].sort(descending=True)
        if count == len(sure):
            thresholds.append(0.0)
        elif count == 0:
            thresholds.append(CLOSED)
        else:
            above, below = float(sure[count - 1]), float(sure[count])
            if above - below < 1e-5:
                raise ValueError(f"no threshold lets {count} of {len(sure)} rows leave: {above} and {below} lie too close")
            thresholds.append((above + below) / 2)
        inside = inside[order[count:]]
    fast.set_thresholds(thresholds)
    taken = fast.run(**subject.inputs).exit_index
    found = [int((taken == i).sum()) for i in range(len(leaving))]
    if found != list(leaving):
        raise ValueError(f"wanted {list(leaving)} rows to leave, and {found} did")
    return thresholds
