"""The models of the GPU benchmark, whole and in the pieces that rivals are built from. Weights are random."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import transformers as hf
from torch import Tensor, nn

from eecompile import CompiledModule, eecompile
from eecompile.kernels.confidence import confidence as confidence_of
from eecompile.strategies import Branchy, MeBert, Strategy

EXITS = 4
POOL = 512  # rows that the inputs of a call are chosen from
CRITERION = "entropy"


def linear(**options: Any) -> Strategy:
    return Branchy(head="linear", **options)


@dataclass
class Subject:
    """A model with four exits, whole and in pieces.

    Attributes:
        pool: Rows `[P, ...]` that inputs are chosen from.
        given: The argument that they are passed as.
        stem: Input to the first block's input; `end`: the last block's output to logits.
        after: Numbers of the blocks that exits come after.
    """

    name: str
    model: nn.Module
    pool: Tensor
    given: str
    stem: Callable[[Tensor], Tensor]
    blocks: list[nn.Module]
    end: Callable[[Tensor], Tensor]
    after: tuple[int, ...]
    strategy: Callable[..., Strategy] = linear

    @cached_property
    def fast(self) -> CompiledModule:
        paths = {id(m): path for path, m in self.model.named_modules()}
        exits = tuple(paths[id(self.blocks[i])] for i in self.after)
        made = eecompile(
            self.model,
            self.strategy(exits=exits, criterion=CRITERION, max_head_share=9.0),
            example_kwargs={self.given: self.pool[:4]},
        )
        made.to(self.pool.device)
        return made

    def tell_apart(self) -> None:
        """Makes the heads say different things of the pool's rows: those of random weights say nearly the same of all.

        The mean of an exit's logits goes into its last bias, and its temperature is such that half of the rows are surer
        than 0.5.
        """
        temperatures = self.fast.temperatures.tolist()
        with torch.no_grad():
            for k in range(EXITS):
                last = [m for m in self.fast.branch(self.fast.exits[k].name).modules() if isinstance(m, nn.Linear)][-1]
                last.bias.sub_(self._said(k).mean(0).to(last.bias))
                logits, low, high = self._said(k), 1e-6, 1e3  # surer at lower temperatures
                for _ in range(40):
                    middle = (low * high) ** 0.5
                    found, _ = confidence_of(logits, None, CRITERION, torch.tensor(middle, device=logits.device))
                    low, high = (middle, high) if float(found.median()) > 0.5 else (low, middle)
                temperatures[k] = high
        self.fast.set_temperatures(temperatures)

    def _said(self, k: int) -> Tensor:
        """Logits of an exit for the whole pool, float32."""
        made = []
        for x in self.pool.split(64):
            hidden = self.stem(x)
            for i in range(k + 1):
                hidden = self.segment(i, hidden)
            made.append(self.head(k, hidden).float())
        return torch.cat(made)

    def logits(self, x: Tensor) -> Tensor:
        """The original."""
        out = self.model(x)
        return out if isinstance(out, Tensor) else out.logits

    def segment(self, k: int, hidden: Tensor) -> Tensor:
        """The blocks between exit `k - 1` and exit `k`; those after the last exit for `k = EXITS`."""
        bounds = [0, *(i + 1 for i in self.after), len(self.blocks)]
        for block in self.blocks[bounds[k] : bounds[k + 1]]:
            out: Any = block(hidden)
            hidden = out[0] if isinstance(out, tuple) else out
        return hidden

    def head(self, k: int, hidden: Tensor) -> Tensor:
        found: Tensor = self.fast.branch(self.fast.exits[k].name)(hidden)
        return found

    def scored(self, k: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Logits `[n, C]` and confidence `[n]` of an exit, in plain torch."""
        logits = self.head(k, hidden)
        found, _ = confidence_of(logits, None, self.fast.exits[k].criterion.name, self.fast.temperatures[k])
        return logits, found


def bert(device: torch.device, small: bool, dtype: torch.dtype) -> Subject:
    """BERT-base at 128 tokens, two classes."""
    sizes: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "num_hidden_layers": 6}
    config = hf.BertConfig(num_labels=2, **(sizes if small else {}))
    model: Any = hf.BertForSequenceClassification(config).eval().to(device, dtype)
    length, rows = (12, 48) if small else (128, POOL)
    ids = torch.randint(1000, config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(2))
    return Subject(
        "BERT-base",
        model,
        ids.to(device),
        "input_ids",
        lambda x: model.bert.embeddings(input_ids=x),
        list(model.bert.encoder.layer),
        lambda hidden: model.classifier(model.bert.pooler(hidden)),
        (0, 1, 2, 3) if small else (2, 5, 8, 10),
        MeBert,
    )


def resnet(device: torch.device, small: bool, dtype: torch.dtype) -> Subject:
    """ResNet-50 at 224 x 224, a thousand classes; its statistics are those of such images."""
    sizes: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [32, 64, 128, 256], "depths": [1, 2, 2, 2]}
    model: Any = hf.ResNetForImageClassification(
        hf.ResNetConfig(num_labels=10 if small else 1000, **(sizes if small else {}))
    )
    pool = images(64, 48) if small else images(224, POOL // 2)
    with torch.no_grad():
        model.to(device).train()
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.momentum = 0.5
        for rows in pool[:32].to(device).split(16):
            model(rows)
    model.eval().to(device, dtype)
    return Subject(
        "ResNet-50",
        model,
        pool.to(device, dtype),
        "pixel_values",
        model.resnet.embedder,
        [layer for stage in model.resnet.encoder.stages for layer in stage.layers],
        lambda hidden: model.classifier(model.resnet.pooler(hidden)),
        (0, 1, 2, 3) if small else (4, 7, 10, 13),
    )


def images(side: int, rows: int) -> Tensor:
    """Noise of as many strengths and means as rows, so that the rows differ in more than their noise."""
    made = torch.Generator().manual_seed(2)
    strength, shift = (torch.rand(rows, 3, 1, 1, generator=made) for _ in range(2))
    return torch.randn(rows, 3, side, side, generator=made) * (0.2 + strength) + 2 * shift - 1


BUILDERS = {"bert": bert, "resnet": resnet}


def made(name: str, device: torch.device, small: bool, dtype: torch.dtype) -> Subject:
    """A model whose heads separate the rows."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        subject = BUILDERS[name](device, small, dtype)
        subject.tell_apart()
    return subject
