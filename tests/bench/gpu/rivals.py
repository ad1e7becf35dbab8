"""What the device executor is measured against, on the same weights, heads and thresholds, each built as well as its idea
allows.

Every rival takes fresh inputs and gives results that the next call does not overwrite, as the device executor does. All give
logits `[B, C]`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tests.bench.gpu.platform import Captured, Platform
from tests.bench.gpu.subjects import EXITS, Subject

Logits = Callable[[Tensor], Tensor]


def graphed(platform: Platform, function: Logits, x: Tensor) -> Logits:
    """Any function of fixed shape as one CUDA graph."""
    own = x.clone()
    captured = platform.capture(lambda: (function(own),))

    def call(x: Tensor) -> Tensor:
        own.copy_(x, non_blocking=True)
        captured.replay()
        return captured.outputs[0].clone()

    return call


class HostBranch:
    """DeeBERT's way (Xin et al. 2020): the modules as they are, a Python `if` after every exit."""

    def __init__(self, subject: Subject, thresholds: Sequence[float]) -> None:
        self.subject, self.thresholds = subject, thresholds

    def one(self, x: Tensor) -> Tensor:
        """A single row."""
        s, hidden = self.subject, self.subject.stem(x)
        for k in range(EXITS):
            hidden = s.segment(k, hidden)
            logits, confidence = s.scored(k, hidden)
            if confidence.item() >= self.thresholds[k]:
                return logits
        return s.end(s.segment(EXITS, hidden))

    def survivors(self, x: Tensor) -> Tensor:
        """Several rows; those that are sure are taken out at every exit."""
        s, hidden = self.subject, self.subject.stem(x)
        rows, out = torch.arange(len(x), device=x.device), None
        for k in range(EXITS):
            hidden = s.segment(k, hidden)
            logits, confidence = s.scored(k, hidden)
            out = torch.empty_like(logits) if out is None else out
            sure = confidence >= self.thresholds[k]
            if sure.any().item():
                out[rows[sure]] = logits[sure]
                rows, hidden = rows[~sure], hidden[~sure]
            if len(rows) == 0:
                return out
        assert out is not None
        out[rows] = s.end(s.segment(EXITS, hidden))
        return out


def settled(
    logits: Tensor, confidence: Tensor, threshold: float | Tensor, answers: Tensor | None, sure: Tensor
) -> tuple[Tensor, Tensor]:
    """Each row keeps the answer that it was first sure of."""
    new = (confidence >= threshold) & ~sure
    return logits if answers is None else torch.where(new[:, None], logits, answers), sure | new


class GraphedBranch:
    """The same, with every stage as a CUDA graph: the host only looks at one flag after each, and launches the next.

    At batch 1 this is the host branch, at more it waits for the whole batch.
    """

    def __init__(self, platform: Platform, subject: Subject, thresholds: Sequence[float], x: Tensor) -> None:
        self.own = x.clone()
        limits = torch.tensor(thresholds, device=x.device)
        self.stages: list[Captured] = []
        before: tuple[Tensor, ...] = ()

        def stage(k: int, before: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            hidden = subject.segment(k, before[0] if before else subject.stem(self.own))
            logits, confidence = subject.scored(k, hidden)
            sure = before[2] if before else torch.zeros(len(x), dtype=torch.bool, device=x.device)
            answers, sure = settled(logits, confidence, limits[k], before[1] if before else None, sure)
            return hidden, answers, sure, sure.all()

        for k in range(EXITS):
            self.stages.append(platform.capture(lambda k=k, before=before: stage(k, before)))
            before = self.stages[-1].outputs
        hidden, answers, sure, _ = before
        self.last = platform.capture(
            lambda: (torch.where(sure[:, None], answers, subject.end(subject.segment(EXITS, hidden))),)
        )

    def __call__(self, x: Tensor) -> Tensor:
        self.own.copy_(x, non_blocking=True)
        for stage in self.stages:
            _, answers, _, done = stage()
            if done.item():
                return answers.clone()
        return self.last()[0].clone()


def cut_at(platform: Platform, subject: Subject, exit: int, x: Tensor) -> Logits:
    """The ideal of a row that leaves at `exit`: a graph of what comes before it and the head of that exit alone."""

    def function(x: Tensor) -> Tensor:
        hidden = subject.stem(x)
        for k in range(min(exit, EXITS - 1) + 1):
            hidden = subject.segment(k, hidden)
        return subject.head(exit, hidden) if exit < EXITS else subject.end(subject.segment(EXITS, hidden))

    return graphed(platform, function, x)


class BareStages:
    """The ideal of a batch: the blocks between the exits, each at the rows that are left there, as one graph.

    No head, no decision, and no copying of survivors: what they are is known before.

    Args:
        exits: `[B]`, where each row leaves.
    """

    def __init__(self, platform: Platform, subject: Subject, exits: Tensor, x: Tensor) -> None:
        exits, self.own = exits.to(x.device), x.clone()
        self.left: list[Tensor] = []  # hidden states of the rows that are left, as each stage is given them
        self.answers = subject.logits(x).zero_()
        rows, hidden = torch.arange(len(x), device=x.device), subject.stem(x)
        for k in range(EXITS + 1):
            rows_left = exits[rows] >= k
            rows, hidden = rows[rows_left], hidden[rows_left].clone()
            if len(rows) == 0:
                break
            self.left.append(hidden)
            hidden = subject.segment(k, hidden)
            here = exits[rows] == k
            if bool(here.any()):
                logits = subject.end(hidden) if k == EXITS else subject.head(k, hidden)
                self.answers[rows[here]] = logits[here]

        def whole() -> tuple[Tensor, ...]:
            outs = [subject.segment(0, subject.stem(self.own))]
            for k, given in enumerate(self.left[1:], start=1):
                given = outs[-1] if len(given) == len(self.left[k - 1]) else given
                outs.append(subject.segment(k, given))
            return (subject.end(outs[-1]) if len(outs) > EXITS else outs[-1],)

        self.captured = platform.capture(whole)

    @property
    def sizes(self) -> list[int]:
        return [len(t) for t in self.left]

    def __call__(self, x: Tensor) -> Tensor:
        """Answers that were worked out before: of the ideal, only the time is wanted."""
        self.own.copy_(x, non_blocking=True)
        self.captured.replay()
        return self.answers.clone()
