"""Classifier branches, chosen by the shape of the value at the exit.

Every head is called as `head(h, mask)` and gives logits with the batch first: `[B, C]`, or `[B, S, C]` for models that
predict per position. `mask` `[B, S]` marks real positions of a sequence, None where the model has no mask.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from eecompile.errors import StrategyError, near


@dataclass(frozen=True)
class Site:
    """Where a head goes and what it must give.

    Attributes:
        sizes: Shape of the value there; a string is a dynamic size.
        batch_axis: Axis of the batch in `sizes`.
        classes: Size of the last axis of the model's prediction.
        positions: Whether the model predicts per position, `[B, S, C]`.
        dtype: Of the value, as a name such as "float32".
        masked: Whether the model takes a padding mask that fits.
        channels_first: Whether positions come last, as after a convolution over time: `[B, D, S]`.
    """

    sizes: tuple[int | str, ...]
    batch_axis: int
    classes: int
    positions: bool = False
    dtype: str = "float32"
    masked: bool = False
    channels_first: bool = False

    @property
    def features(self) -> tuple[int | str, ...]:
        """Sizes without the batch."""
        return self.sizes[: self.batch_axis] + self.sizes[self.batch_axis + 1 :]

    @property
    def kind(self) -> str:
        """ "map" `[B, C, H, W]`, "sequence" `[B, S, D]` or `[B, D, S]`, "vector" `[B, D]`, or "other"."""
        if len(self.sizes) == 4 and self.batch_axis == 0 and isinstance(self.sizes[1], int):
            return "map"
        if (
            len(self.sizes) == 3
            and self.batch_axis in (0, 1)
            and isinstance(self.sizes[1 if self.channels_first else 2], int)
        ):
            return "sequence"
        if len(self.sizes) == 2 and self.batch_axis == 0 and isinstance(self.sizes[1], int):
            return "vector"
        return "other"

    @property
    def width(self) -> int:
        """Channels of a map, features of a sequence or vector."""
        size = self.sizes[1] if self.kind == "map" or self.channels_first else self.sizes[-1]
        return int(size)

    def sequence(self, h: Tensor) -> Tensor:
        """`[B, S, D]` of a sequence in whatever order its axes are; other values as they are, with the batch first."""
        if self.channels_first:
            return h.transpose(1, 2)
        return h.transpose(0, self.batch_axis) if self.batch_axis else h


def mean_over_positions(h: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of `[B, S, D]` over the real positions; `mask` `[B, S]`. Rows without one give 0."""
    if mask is None:
        return h.mean(1)
    weight = mask.to(h.dtype).unsqueeze(-1)
    return (h * weight).sum(1) / weight.sum(1).clamp(min=1)


class Head(nn.Module):
    """A head that can be saved as JSON and built again: what it reads of the value, without parameters, then its layers.

    Attributes:
        kind: Its name.
        fits: Kinds of site that it takes.
        reads: What its layers need of the value: "mean" over the positions of a sequence or map (each position, where the
            model predicts per position), "first" position, or "all" of it.
    """

    kind: ClassVar[str] = ""
    fits: ClassVar[tuple[str, ...]] = ()
    reads: ClassVar[str] = "mean"

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.site = site

    @property
    def options(self) -> dict[str, Any]:
        """Options that it was built with."""
        return {}

    def pooled(self, h: Tensor, mask: Tensor | None) -> Tensor:
        """`[B, width]` from a value at the site."""
        if self.site.kind == "map":
            return h.mean((2, 3))
        if self.site.kind == "sequence":
            return mean_over_positions(self.site.sequence(h), mask)
        return h

    def read(self, h: Tensor, mask: Tensor | None = None) -> Tensor:
        """What the layers work on, from a value at the site: `[B, width]`, `[B, S, width]` or the value itself."""
        if self.reads == "all":
            return h
        if self.reads == "first":
            return self.site.sequence(h)[:, 0]
        return self.site.sequence(h) if self.site.positions else self.pooled(h, mask)

    def layers(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits from what `read` gives."""
        raise NotImplementedError

    def forward(self, h: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.layers(self.read(h, mask), mask)


class LinearHead(Head):
    """Pool, normalise where it is a sequence, one linear layer. Per position where the model predicts per position."""

    kind = "linear"
    fits: ClassVar[tuple[str, ...]] = ("map", "sequence", "vector")

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.norm: nn.Module = nn.LayerNorm(site.width) if site.kind == "sequence" else nn.Identity()
        self.classifier = nn.Linear(site.width, site.classes)

    def layers(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        out: Tensor = self.classifier(self.norm(x))
        return out


class FirstTokenHead(LinearHead):
    """The first token, normalised, one linear layer."""

    kind = "first"
    fits: ClassVar[tuple[str, ...]] = ("sequence",)
    reads = "first"


class AttentionHead(Head):
    """Mean of the real positions weighted by a learned score of each (Lin et al. 2017, one hop), then one linear layer."""

    kind = "attention"
    fits = ("sequence",)
    reads = "all"

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.norm = nn.LayerNorm(site.width)
        self.score = nn.Linear(site.width, 1)
        self.classifier = nn.Linear(site.width, site.classes)

    def layers(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.norm(self.site.sequence(x))
        score = self.score(x)
        if mask is not None:  # the smallest number in place of -inf: a row without a real position keeps a finite mean
            score = score.masked_fill(mask.unsqueeze(-1) == 0, torch.finfo(score.dtype).min)
        out: Tensor = self.classifier((x * score.softmax(1)).sum(1))
        return out


class ConvHead(Head):
    """The branch of BranchyNet (Teerapittayanon et al. 2016): a 3x3 convolution, then a classifier on a 4x4 map."""

    kind = "conv"
    fits = ("map",)
    reads = "all"

    def __init__(self, site: Site, channels: int | None = None) -> None:
        super().__init__(site)
        out = channels or max(16, min(site.width, 64))
        smallest = min((s for s in site.sizes[2:] if isinstance(s, int)), default=8)
        # A stride first: the convolution of a branch must not cost what the trunk's own layers cost.
        stride = 2 if smallest >= 8 else 1
        self.conv = nn.Conv2d(site.width, out, 3, stride=stride, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(out)
        side = min(4, max(1, smallest // stride))
        self.pool = nn.AdaptiveAvgPool2d(side)
        self.classifier = nn.Linear(out * side * side, site.classes)

    @property
    def options(self) -> dict[str, Any]:
        return {"channels": self.conv.out_channels}

    def layers(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.pool(torch.relu(self.norm(self.conv(x))))
        out: Tensor = self.classifier(x.flatten(1))
        return out


class MLPHead(Head):
    """Pool, one hidden layer, classifier."""

    kind = "mlp"
    fits = ("map", "sequence", "vector")

    def __init__(self, site: Site, hidden: int | None = None) -> None:
        super().__init__(site)
        hidden = hidden or max(32, min(site.width, 256))
        self.norm: nn.Module = nn.LayerNorm(site.width) if site.kind == "sequence" else nn.Identity()
        self.hidden = nn.Linear(site.width, hidden)
        self.classifier = nn.Linear(hidden, site.classes)

    @property
    def options(self) -> dict[str, Any]:
        return {"hidden": self.hidden.out_features}

    def layers(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        out: Tensor = self.classifier(torch.relu(self.hidden(self.norm(x))))
        return out


class PoolerHead(Head):
    """The head of BERT: first token, dense, tanh, dropout, classifier (DeeBERT, Xin et al. 2020)."""

    kind = "pooler"
    fits = ("sequence",)
    reads = "first"

    def __init__(self, site: Site, dropout: float = 0.1) -> None:
        super().__init__(site)
        self.pooler = nn.Linear(site.width, site.width)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(site.width, site.classes)

    @property
    def options(self) -> dict[str, Any]:
        return {"dropout": self.dropout.p}

    def layers(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        out: Tensor = self.classifier(self.dropout(torch.tanh(self.pooler(x))))
        return out


class Branch(nn.Module):
    """A head and, for the learned criterion, the score that says whether the head is right.

    Called with the value at the exit and a mask; gives logits, and the score's logit `[B, 1]` with them if there is one.
    """

    def __init__(self, head: nn.Module, score: nn.Module | None = None, takes_mask: bool = True) -> None:
        super().__init__()
        self.head = head
        self.score = score
        self.takes_mask = takes_mask

    def forward(self, h: Tensor, *rest: Tensor | None) -> Any:
        logits = self.head(h, *rest) if self.takes_mask else self.head(h)
        if isinstance(logits, tuple):  # a shared tail taken out of the graph gives a tuple of one
            logits = logits[0]
        return logits if self.score is None else (logits, self.score(h))


class IdentityHead(Head):
    """No head: the value at the exit holds class scores already, as the prediction of another model does."""

    kind = "identity"
    fits = ("vector", "sequence")
    reads = "all"

    def layers(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.site.sequence(x)


KINDS = (LinearHead, FirstTokenHead, AttentionHead, ConvHead, MLPHead, PoolerHead, IdentityHead)
HEADS: dict[str, type[Head]] = {h.kind: h for h in KINDS}
ONE_A_ROW = ("conv", "pooler", "first", "attention")  # one prediction for a row, where the model may give one per position
Fits = TypeVar("Fits", bound=nn.Module)
HeadSpec = str | nn.Module | Callable[[Site], nn.Module]


def default_kind(site: Site) -> str:
    """What `head="auto"` takes: the conv branch on maps, one linear layer elsewhere."""
    return "conv" if site.kind == "map" else "linear"


def fitting(
    what: str,
    kinds: Mapping[str, type[Fits]],
    kind: str,
    site: Site,
    where: str,
    others: Sequence[str] = ("auto",),
    hint: str | None = None,
) -> type[Fits]:
    """The class with this name, if it takes a value of the site's shape.

    Args:
        what: What the classes are, for people: "head", "gate unit".
        others: Further names that are known.
        hint: What to do where it does not fit.

    Raises:
        StrategyError: Unknown, or it does not fit.
    """
    if kind not in kinds:
        raise StrategyError(f"unknown {what}", where=where, got=repr(kind), wanted=near(kind, [*kinds, *others]))
    fits: Sequence[str] = kinds[kind].fits  # type: ignore[attr-defined]
    if site.kind not in fits:
        raise StrategyError(
            f"{what} {kind!r} does not fit the value at this place",
            where=where,
            got=f"{site.kind} {list(site.sizes)}",
            wanted=" or ".join(fits),
            hint=hint,
        )
    return kinds[kind]


def build_head(spec: HeadSpec, site: Site, where: str) -> nn.Module:
    """A head for a site: by name, a copy of the given module, or what the given factory makes.

    Raises:
        StrategyError: Unknown name, a shape that the head does not take, or logits of the wrong size.
    """
    if isinstance(spec, str):
        kind = default_kind(site) if spec == "auto" else spec
        made = fitting("head", HEADS, kind, site, where, ("auto", "shared"), "give a module or a factory as head=")
        if site.positions and kind in ONE_A_ROW:
            raise StrategyError(
                f"head {kind!r} gives one prediction for a row, the model gives one per position",
                where=where,
                wanted="linear, mlp or shared",
            )
        return made(site)
    if isinstance(spec, nn.Module):
        return copy.deepcopy(spec)
    module = spec(site)
    if not isinstance(module, nn.Module):
        raise StrategyError(
            "a head factory gave no module", where=where, got=type(module).__name__, wanted="torch.nn.Module"
        )
    return module


def check_head(head: nn.Module, site: Site, where: str) -> bool:
    """Runs a user's head once on two rows; says whether it takes a mask.

    Raises:
        StrategyError: It fails, or its logits have the wrong shape.
    """
    sizes = [s if isinstance(s, int) else 4 for s in site.sizes]
    sizes[site.batch_axis] = 2
    h = torch.zeros(sizes, dtype=getattr(torch, site.dtype))
    length = sizes[2 if site.channels_first else 1 - site.batch_axis] if site.kind == "sequence" else 0
    wanted = (2, length, site.classes) if site.positions else (2, site.classes)
    takes_mask = isinstance(head, Head)
    head = copy.deepcopy(head).to("cpu").eval()
    try:
        with torch.no_grad():
            logits = head(h, None) if takes_mask else head(h)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise StrategyError(
            "the head does not run on the value at its place",
            where=where,
            got=f"{type(error).__name__}: {str(error).splitlines()[0]}",
            wanted=f"a module for {list(site.sizes)}",
        ) from error
    if not isinstance(logits, Tensor) or tuple(logits.shape) != wanted:
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise StrategyError(
            "the head gives logits of the wrong size", where=where, got=got, wanted=f"{list(wanted)} for two rows"
        )
    return takes_mask


def score_head(site: Site) -> nn.Module:
    """The exit score of the learned criterion: `[B, 1]` from the pooled value."""
    return LinearHead(replace(site, classes=1, positions=False, masked=False))


def describe(branch: Branch) -> dict[str, Any] | None:
    """The head as JSON data, None for a module that eecompile did not make."""
    head = branch.head
    if not isinstance(head, Head) or type(head) is not HEADS.get(head.kind):
        return None
    return {**as_data(head), "score": branch.score is not None}


def rebuild(data: dict[str, Any]) -> Branch:
    """The inverse of `describe`; weights are loaded afterwards."""
    head = from_data(HEADS, data)
    return Branch(head, score_head(head.site) if data["score"] else None)


def as_data(unit: Any) -> dict[str, Any]:
    """A head, a gate's unit or a router's as JSON data: its kind, its site, and the options that it was built with."""
    return {"kind": unit.kind, "site": asdict(unit.site), "options": unit.options}


def from_data(kinds: Mapping[str, type[Fits]], data: Mapping[str, Any], **more: Any) -> Fits:
    """The inverse of `as_data` among these kinds; weights are loaded afterwards."""
    site = Site(**{**data["site"], "sizes": tuple(data["site"]["sizes"])})
    return kinds[data["kind"]](site, **data["options"], **more)
