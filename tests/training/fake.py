"""A small hand-written early-exit network with what training and calibration read of a compiled module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from eecompile.criteria import Criterion, MaxProbability
from eecompile.ir import settings
from eecompile.ir.settings import Settings
from eecompile.kernels.confidence import confidence
from eecompile.result import Result, Trace


@dataclass(frozen=True)
class FakeExit:
    name: str
    depth: float
    criterion: Criterion = field(default_factory=MaxProbability)


class Fake(nn.Module):
    """`width -> width -> ... -> classes` with a head (dropout, batch norm) after every block but the last."""

    def __init__(
        self,
        exits: int = 2,
        width: int = 8,
        classes: int = 3,
        criterion: Criterion | None = None,
        objective: Any = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.blocks = nn.ModuleList(
                nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.Tanh()) for _ in range(exits + 1)
            )
            self.end = nn.Linear(width, classes)
            self.heads = nn.ModuleList(
                nn.Sequential(nn.Dropout(0.3), nn.Linear(width, width), nn.BatchNorm1d(width), nn.Linear(width, classes))
                for _ in range(exits)
            )
            self.scorers = nn.ModuleList(nn.Linear(width, 1) for _ in range(exits))
        self.criterion = criterion or MaxProbability()
        self.exits = tuple(FakeExit(f"exit_{k}", (k + 1) / (exits + 1), self.criterion) for k in range(exits))
        self.register_buffer("thresholds", torch.full((exits,), 0.9))
        self.register_buffer("temperatures", torch.ones(exits + 1))
        self.strategy = SimpleNamespace(objective=objective)
        self.trunk_trains = False

    def train(self, mode: bool = True) -> Fake:
        super().train(mode)
        if not self.trunk_trains:
            self.blocks.train(False)
            self.end.train(False)
        return self

    def set_thresholds(self, thresholds: list[float]) -> None:
        self.thresholds.copy_(torch.tensor(thresholds))

    def set_temperatures(self, temperatures: list[float]) -> None:
        self.temperatures.copy_(torch.tensor(temperatures))

    @property
    def settings(self) -> Settings:
        names = [record.name for record in self.exits]
        return (
            Settings()
            .add(settings.exits(names), self.thresholds.tolist())
            .add(settings.temperatures(names), self.temperatures.tolist())
        )

    @settings.setter
    def settings(self, new: Settings) -> None:
        self.set_thresholds(list(new[settings.EXITS]))
        self.set_temperatures(list(new[settings.TEMPERATURES]))

    def head_parameters(self) -> Iterator[nn.Parameter]:
        yield from self.heads.parameters()
        if self.criterion.learned:
            yield from self.scorers.parameters()

    def trunk_parameters(self) -> Iterator[nn.Parameter]:
        yield from self.blocks.parameters()
        yield from self.end.parameters()

    def own_trunk(self, in_place: bool = False) -> None:
        """Trained as it is: nothing of it belongs to anybody else."""

    @contextmanager
    def prepare_training(self, trunk: bool) -> Iterator[None]:
        flags = [(p, p.requires_grad) for p in self.trunk_parameters()]
        self.trunk_trains = trunk
        for p, _ in flags:
            p.requires_grad_(trunk)
        try:
            yield
        finally:
            self.trunk_trains = False
            for p, flag in flags:
                p.requires_grad_(flag)

    def _outputs(self, x: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...] | None]:
        outputs, scores = [], []
        for k, block in enumerate(self.blocks):
            x = block(x)
            if k < len(self.heads):
                outputs.append(self.heads[k](x))
                scores.append(self.scorers[k](x.detach())[:, 0])
        outputs.append(self.end(x))
        return tuple(outputs), tuple(scores) if self.criterion.learned else None

    def run(self, x: Tensor) -> Result:
        outputs, scores = self._outputs(x)
        return self.result(outputs, scores)

    def result(self, outputs: Sequence[Tensor], scores: Sequence[Tensor] | None) -> Result:
        confidences = confidences_of(self, outputs, self.temperatures, scores, self.thresholds)
        n = outputs[0].shape[0]
        index = torch.full((n,), len(self.exits))
        for k in reversed(range(len(self.exits))):
            index = torch.where(confidences[k] >= self.thresholds[k], k, index)
        rows = torch.arange(n)
        return Result(
            output=torch.stack(tuple(outputs))[index, rows],
            exit_index=index,
            confidence=torch.stack(confidences)[index, rows],
            cost=self.costs(tuple((self.thresholds <= 1).tolist()))[index],
            trace=Trace(tuple(outputs), confidences, scores=None if scores is None else tuple(scores)),
        )

    def observe(self, x: Tensor) -> Result:
        mode = self.training
        self.eval()
        with torch.no_grad():
            result = self.run(x)
        self.train(mode)
        return result

    def observe_at(self, new: Settings, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Result:
        before, self.settings = self.settings, new
        try:
            return self.observe(*args, **kwargs)
        finally:
            self.settings = before

    def confidences_of(
        self, outputs: Sequence[Tensor], temperatures: Tensor, scores: Sequence[Tensor] | None = None
    ) -> tuple[Tensor, ...]:
        return confidences_of(self, outputs, temperatures, scores, torch.zeros(len(self.exits)))

    def costs(self, open_exits: tuple[bool, ...], settings: Settings | None = None) -> Tensor:
        e = len(self.exits)
        heads = torch.tensor([0.02 if is_open else 0.0 for is_open in open_exits] + [0.0]).cumsum(0)
        return torch.tensor([record.depth for record in self.exits] + [1.0]) + heads[: e + 1]

    def prediction_of(self, output: Any) -> Tensor:
        return output


def confidences_of(
    fast: Any,
    outputs: Sequence[Tensor],
    temperatures: Tensor,
    scores: Sequence[Tensor] | None,
    thresholds: Tensor,
) -> tuple[Tensor, ...]:
    criterion, state, found = fast.criterion, None, []
    for k, output in enumerate(outputs):
        last = k == len(outputs) - 1
        name = "max_probability" if last and (criterion.stateful or criterion.learned) else criterion.name
        logits = scores[k][:, None] if name == "learned" else output
        value, new = confidence(
            logits,
            state,
            name,
            temperatures[k],
            patience=criterion.patience,
            threshold=None if last else thresholds[k],
        )
        state = new if criterion.stateful else None
        found.append(value)
    return tuple(found)


def blobs(n: int = 48, width: int = 8, classes: int = 3, seed: int = 0, noise: float = 1.0) -> tuple[Tensor, Tensor]:
    """`n` points around one centre per class."""
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(123)) * 2
    y = torch.arange(n) % classes
    return centres[y] + noise * torch.randn(n, width, generator=g), y


def batched(x: Tensor, y: Tensor, size: int = 8) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.split(size), y.split(size), strict=True))
