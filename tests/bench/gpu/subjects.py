"""The models of the GPU benchmark, whole and in the pieces that rivals are built from. Weights are random.

BERT-base is that of transformers; the other two are plain torch, as in `tests/zoo_plain.py`.
"""

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
from torch.nn import functional as F

from eecompile import CompiledModule, eecompile
from eecompile.kernels.confidence import confidence as confidence_of
from eecompile.strategies import Branchy, MeBert, Strategy

EXITS = 4
POOL = 512  # rows that the inputs of a call are chosen from
CRITERION = "entropy"


class Block(nn.Module):
    """A Transformer block that normalises first."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        out: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return out


class VisionTransformer(nn.Module):
    """ViT-base by default (Dosovitskiy et al. 2021): patches of 16 of an image of 224."""

    def __init__(
        self, width: int = 768, depth: int = 12, heads: int = 12, side: int = 224, patch: int = 16, classes: int = 1000
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.position = nn.Parameter(torch.randn(1, (side // patch) ** 2 + 1, width) * 0.02)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def stem(self, x: Tensor) -> Tensor:
        rows = self.patches(x).flatten(2).transpose(1, 2)
        return torch.cat([self.token.expand(rows.shape[0], -1, -1), rows], 1) + self.position

    def end(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(hidden)[:, 0])
        return out

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.stem(x)
        for block in self.blocks:
            hidden = block(hidden)
        return self.end(hidden)


class Bottleneck(nn.Module):
    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(before, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        self.short = (
            nn.Sequential(nn.Conv2d(before, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width))
            if stride > 1 or before != 4 * width
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + self.short(x))


class ResNet(nn.Module):
    """ResNet-50 by default (He et al. 2016)."""

    def __init__(self, width: int = 64, depths: tuple[int, ...] = (3, 4, 6, 3), classes: int = 1000) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width)
        self.blocks, before = nn.ModuleList(), width
        for i, depth in enumerate(depths):
            for j in range(depth):
                self.blocks.append(Bottleneck(before, width << i, 2 if i > 0 and j == 0 else 1))
                before = 4 * width << i
        self.head = nn.Linear(before, classes)

    def stem(self, x: Tensor) -> Tensor:
        return F.max_pool2d(F.relu(self.bn(self.conv(x))), 3, 2, 1)

    def end(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.head(hidden.mean((2, 3)))
        return out

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.stem(x)
        for block in self.blocks:
            hidden = block(hidden)
        return self.end(hidden)


def linear(**options: Any) -> Strategy:
    return Branchy(head="linear", **options)


@dataclass
class Subject:
    """A model with four exits, whole and in pieces.

    Attributes:
        pool: Rows `[P, ...]` that inputs are chosen from.
        given: The argument that they are passed as.
        stem: Input to the first block's input; `end`: the last block's output to logits.
        after: Numbers of the blocks that exits stand behind.
    """

    name: str
    model: nn.Module
    pool: Tensor
    given: str
    stem: Callable[[Tensor], Tensor]
    blocks: nn.ModuleList
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
        """The blocks between exit `k - 1` and exit `k`; those behind the last exit for `k = EXITS`."""
        bounds = [0, *(i + 1 for i in self.after), len(self.blocks)]
        for block in self.blocks[bounds[k] : bounds[k + 1]]:
            out: Any = block(hidden)
            hidden = out[0] if isinstance(out, tuple) else out
        return hidden

    def head(self, k: int, hidden: Tensor) -> Tensor:
        found: Tensor = self.fast.branch(self.fast.exits[k].name)(hidden)
        return found

    def judged(self, k: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Logits `[n, C]` and confidence `[n]` of an exit, in plain torch."""
        logits = self.head(k, hidden)
        found, _ = confidence_of(logits, None, self.fast.exits[k].criterion.name, self.fast.temperatures[k])
        return logits, found


def bert(device: torch.device, dtype: torch.dtype, small: bool) -> Subject:
    """BERT-base at 128 tokens, two classes."""
    sizes: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "num_hidden_layers": 6}
    torch.manual_seed(0)
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
        model.bert.encoder.layer,
        lambda hidden: model.classifier(model.bert.pooler(hidden)),
        (0, 1, 2, 3) if small else (2, 5, 8, 10),
        MeBert,
    )


def vit(device: torch.device, dtype: torch.dtype, small: bool) -> Subject:
    """ViT-base at 224 x 224, a thousand classes."""
    torch.manual_seed(0)
    model = VisionTransformer(32, 6, 2, 32, 8, 10) if small else VisionTransformer()
    made = images(32, 48) if small else images(224, POOL // 2)
    return plain("ViT-base", model, made, (0, 1, 2, 3) if small else (2, 5, 8, 10), device, dtype)


def resnet(device: torch.device, dtype: torch.dtype, small: bool) -> Subject:
    """ResNet-50 at 224 x 224, a thousand classes; its statistics are those of such images."""
    torch.manual_seed(0)
    model = ResNet(8, (1, 2, 2, 2), 10) if small else ResNet()
    made = images(64, 48) if small else images(224, POOL // 2)
    with torch.no_grad():
        model.to(device).train()
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.momentum = 0.5
        for rows in made[:32].to(device).split(16):
            model(rows)
    return plain("ResNet-50", model, made, (0, 1, 2, 3) if small else (4, 7, 10, 13), device, dtype)


def plain(
    name: str,
    model: VisionTransformer | ResNet,
    pool: Tensor,
    after: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype,
) -> Subject:
    model.eval().to(device, dtype)
    return Subject(name, model, pool.to(device, dtype), "x", model.stem, model.blocks, model.end, after)


def images(side: int, rows: int) -> Tensor:
    """Noise of as many strengths and means as rows, so that the rows differ in more than their noise."""
    made = torch.Generator().manual_seed(2)
    strength, shift = (torch.rand(rows, 3, 1, 1, generator=made) for _ in range(2))
    return torch.randn(rows, 3, side, side, generator=made) * (0.2 + strength) + 2 * shift - 1


BUILDERS = {"bert": bert, "vit": vit, "resnet": resnet}
