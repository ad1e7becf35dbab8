"""What drafting at each exit would gain: acceptance on text, times on this machine, and the speed that follows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from rich.console import RenderableType
from torch import Tensor, nn

from eecompile.errors import StrategyError
from eecompile.language.cache import SlotCache, Slots
from eecompile.language.draft import DraftHead, text_batches, vocabulary_of
from eecompile.language.split import Split
from eecompile.training.report import Report, json_safe, percent, stacked, table

THRESHOLDS = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95)
DRAFTS = (1, 2, 3, 4, 6, 8)
ROUNDS = 7
GAIN = 0.95  # of its time that a pass takes at most with columns added
CONTEXT = 64  # tokens in the cache while passes are timed


@dataclass(frozen=True)
class Candidate:
    """The best that one exit offers.

    Attributes:
        exit: Blocks of the lower part.
        agreement: Share of positions at which the draft head gives the model's own next token.
        threshold, max_draft: The options with the largest projected speed there.
        acceptance: Share of drafted tokens that would be kept with them.
        tokens: New tokens for each run of the upper part.
        lower_ms, head_ms, upper_ms: Time of a pass of one token; of `max_draft + 1` tokens for the upper part.
        draft_cost: Time that a draft of one token adds, in tokens of plain decoding.
        widths: With how many columns passes of 1, 2, ... columns run fastest.
        speed: Projected tokens a second over those of plain decoding.
    """

    exit: int
    agreement: float
    threshold: float
    max_draft: int
    acceptance: float
    tokens: float
    lower_ms: float
    head_ms: float
    upper_ms: float
    draft_cost: float
    widths: tuple[int, ...]
    speed: float


@dataclass
class SpeculationReport(Report):
    """Projected speed of self-speculative decoding by exit.

    Attributes:
        candidates: One for each exit that was tried.
        plain_ms: Time of one token of plain decoding.
        positions: Positions of text that acceptance was measured on.
    """

    title: ClassVar[str] = "Self-speculation"

    candidates: list[Candidate]
    plain_ms: float
    positions: int

    @property
    def best(self) -> Candidate:
        return max(self.candidates, key=lambda c: c.speed)

    def to_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = json_safe({**vars(self), "candidates": [asdict(c) for c in self.candidates]})
        return {**found, "best": json_safe(asdict(self.best))}

    def __rich__(self) -> RenderableType:
        rows = [
            [
                str(c.exit), percent(c.agreement, 1), f"{c.threshold:.2f}", str(c.max_draft), percent(c.acceptance, 1),
                f"{c.tokens:.2f}", f"{c.lower_ms:.2f}", f"{c.head_ms:.2f}", f"{c.upper_ms:.2f}", f"{c.speed:.2f}x",
            ]
            for c in self.candidates
        ]  # fmt: skip
        heads = [
            "exit",
            "agreement",
            "threshold",
            "draft",
            "accepted",
            "tokens/pass",
            "lower ms",
            "head ms",
            "upper ms",
            "speed",
        ]
        best = self.best
        return stacked(
            table(self.title, heads, rows),
            f"plain decoding takes {self.plain_ms:.2f} ms a token; acceptance on {self.positions:,} positions of text",
            f"best: exit {best.exit}, up to {best.max_draft} tokens at {best.threshold}, projected {best.speed:.2f}x",
        )


@torch.no_grad()
def project(
    model: nn.Module, blocks: str, exits: Sequence[int], heads: dict[int, DraftHead], loader: Iterable[Any], most: int
) -> SpeculationReport:
    """Projected speed for each exit, from up to `most` positions of text.

    Raises:
        StrategyError: No batch of text.
    """
    agreements: dict[int, list[tuple[Tensor, Tensor]]] = {e: [] for e in exits}
    splits = {e: Split(model, blocks, e) for e in exits}
    positions, example = 0, None
    for ids, mask in text_batches(loader, vocabulary_of(model)):
        example = ids if example is None else example
        for row, real in zip(ids, mask.bool(), strict=True):
            line = row[real][None]
            own = model(input_ids=line, use_cache=False).logits.argmax(-1)[0]
            for e in exits:
                hidden = _lower(splits[e], line)
                agreements[e].append(_drafts(splits[e], heads.get(e), line, hidden, own))
            positions += len(own)
        if positions >= most:
            break
    if example is None:
        raise StrategyError("the loader gave no batch", wanted="batches of token ids")
    context = example[:1].repeat(1, CONTEXT // example.shape[1] + 1)[:, :CONTEXT]
    plain, timed = _times(model, splits, heads, context)
    found = [_best(e, agreements[e], plain, timed[e]) for e in exits]
    return SpeculationReport(found, 1e3 * plain, positions)


def _lower(split: Split, ids: Tensor) -> Tensor:
    length = ids.shape[1]
    index = torch.arange(length, device=ids.device)[None]
    return split.lower(ids, Slots(index, index.new_zeros(1), length, True), SlotCache(split.count))


def _drafts(split: Split, head: DraftHead | None, ids: Tensor, hidden: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """Whether the draft is the model's own token, and its probability, at each position of one row."""
    logits = (split.head(ids, hidden) if head is None else head(hidden.float()))[0].float()
    probability, best = logits.softmax(-1).max(-1)
    return (best if head is None else head.vocabulary[best]) == own, probability


def _times(
    model: nn.Module, splits: dict[int, Split], heads: dict[int, DraftHead], context: Tensor
) -> tuple[float, dict[int, tuple[float, float, list[float]]]]:
    """Seconds of a token of plain decoding; for each exit of lower, head, and upper by number of tokens; in turns."""
    length = context.shape[1]
    widest = max(DRAFTS) + 1
    calls: dict[Any, Callable[[], Any]] = {}
    any_split = next(iter(splits.values()))

    def slots(width: int) -> Slots:
        index = torch.arange(length, length + width, device=context.device)[None]
        return Slots(index, index.new_zeros(1), length + width, True)

    def columns(width: int) -> Tensor:
        return context[:, :1].expand(1, width)

    def filled() -> SlotCache:
        cache = SlotCache(any_split.count)
        index = torch.arange(length, device=context.device)[None]
        any_split.full(context, Slots(index, index.new_zeros(1), length, True), cache)
        return cache

    cache = filled()
    calls["plain"] = lambda: any_split.full(columns(1), slots(1), cache)
    for e, split in splits.items():
        hidden = split.lower(columns(widest), slots(widest), cache)
        head = heads.get(e)

        def lower(split: Split = split) -> Any:
            return split.lower(columns(1), slots(1), cache)

        def draft(split: Split = split, head: DraftHead | None = head, hidden: Tensor = hidden) -> Any:
            one = hidden[:, :1]
            return split.head(columns(1), one) if head is None else head(one.float())

        def upper(width: int, split: Split = split, hidden: Tensor = hidden) -> Any:
            return split.upper(columns(width), hidden[:, :width], slots(width), cache)

        calls[e, "lower"], calls[e, "head"] = lower, draft
        for width in range(1, widest + 1):
            calls[e, width] = partial(upper, width)
    taken: dict[Any, list[float]] = {key: [] for key in calls}
    for _ in range(ROUNDS + 1):
        for key, call in calls.items():
            start = time.perf_counter()
            call()
            taken[key].append(time.perf_counter() - start)
    seconds = {key: min(values[1:]) for key, values in taken.items()}  # what other processes take only adds to it
    uppers = {e: [seconds[e, w] for w in range(1, widest + 1)] for e in splits}
    return seconds["plain"], {e: (seconds[e, "lower"], seconds[e, "head"], uppers[e]) for e in splits}


def _fastest(uppers: list[float]) -> tuple[int, ...]:
    """With how many columns a pass of 1, 2, ... columns takes least; one column stays one."""
    found = [1]
    for width in range(2, len(uppers) + 1):
        best = min(range(width, len(uppers) + 1), key=lambda w: uppers[w - 1])
        found.append(best if uppers[best - 1] < GAIN * uppers[width - 1] else width)
    return tuple(found)


def _best(exit: int, rows: list[tuple[Tensor, Tensor]], plain: float, times: tuple[float, float, list[float]]) -> Candidate:
    """The threshold and length of a draft with the largest projected speed, by walking along the text."""
    lower, head, uppers = times
    widths = _fastest(uppers)
    added = (uppers[widths[1] - 1] - uppers[0] + lower + head) / plain
    best: Candidate | None = None
    for threshold in THRESHOLDS:
        for most in DRAFTS:
            tokens = rounds = drafted = accepted = 0
            spent = 0.0
            for right, sure in rows:
                wanted, ok = sure.tolist(), right.tolist()
                at = 0
                while at < len(ok):
                    count = 0
                    while count < most and at + count < len(ok) and wanted[at + count] >= threshold:
                        count += 1
                    kept = 0
                    while kept < count and ok[at + kept]:
                        kept += 1
                    heads_run = count + (count < most)
                    spent += (count + 1) * lower + heads_run * head + uppers[widths[count] - 1]
                    tokens += kept + 1
                    rounds += 1
                    drafted += count
                    accepted += kept
                    at += kept + 1
            speed = tokens * plain / spent
            if best is None or speed > best.speed:
                agreement = float(torch.cat([r for r, _ in rows]).float().mean())
                best = Candidate(
                    exit, agreement, threshold, most, accepted / drafted if drafted else float("nan"), tokens / rounds,
                    1e3 * lower, 1e3 * head, 1e3 * uppers[widths[most] - 1], added, widths, speed,
                )  # fmt: skip
    assert best is not None
    return best
