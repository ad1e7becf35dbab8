"""The training half of the compiled module: fit, calibrate, evaluate, and the graphs that gradients go through."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

from torch import Tensor, fx, nn

from eecompile import benchmark as benchmarks
from eecompile.calibration.budget import budget_curve, calibrate_budget
from eecompile.calibration.calibrate import calibrate
from eecompile.calibration.guarantee import Guarantee, guarantee_of, said
from eecompile.decisions import Decisions
from eecompile.errors import EecompileError
from eecompile.own_trunk import COPIED, IN_PLACE, copy_trunk
from eecompile.passes import facts
from eecompile.passes.every_step import with_every_step
from eecompile.passes.training_decisions import with_decisions
from eecompile.passes.training_graph import frozen_trunk
from eecompile.plain import plain
from eecompile.program import Program, Result
from eecompile.signature import Signature
from eecompile.strategies.base import Strategy
from eecompile.training.evaluate import evaluate
from eecompile.training.fit import fit, objective_of
from eecompile.training.objectives import Sum
from eecompile.training.objectives import objective as resolve
from eecompile.training.protocol import Compiled
from eecompile.training.state import random_state, restore_random_state


class Trainable(Decisions):
    """What training needs of a compiled module; `CompiledModule` fills in the rest."""

    strategy: Strategy
    train_trunk: bool
    gate_mode: str = "hard"  # how gates decide in train mode; see `passes/training_decisions.py`
    gates_kept_open: int = 0  # the first so many gates do not decide in train mode: a curriculum
    gates_full_share: float = 0.0  # share of a batch's rows, the first ones, that all gates let in in train mode
    notes: tuple[str, ...]
    guarantee: Guarantee | None = None  # of the last `calibrate`; `explain` says whether it still holds
    trained_by_loss: bool = False  # whether `fit` was last given loss=: the largest score may be no answer then
    _training_program: Callable[[Any], Program] | None
    train_signature: Signature | None  # of the train-mode capture, once there is one

    @property
    def compiled(self) -> Compiled:
        """This module, as training and calibration see it."""
        return cast(Compiled, self)

    def fit(self, loader: Iterable[Any], **options: Any) -> Any:
        """Trains what was inserted; see `eecompile.training.fit.fit`. The trunk stays frozen unless asked."""
        return fit(self.compiled, loader, **_plain(options))

    def calibrate(self, loader: Iterable[Any], *, budget: float | None = None, **options: Any) -> Any:
        """Sets temperatures and thresholds with a guarantee; see `eecompile.calibration.calibrate.calibrate`.

        With `budget=`, a mean fraction of the full model's cost, the most accurate thresholds that keep it instead; see
        `eecompile.calibration.budget.calibrate_budget`.
        """
        if budget is not None and (both := {"max_drop", "delta"} & set(options)):
            raise EecompileError(
                f"{min(both)}= and budget= are two ways to calibrate", got="both", wanted="one of them",
                hint="a budget fixes the cost and gives the best accuracy; max_drop fixes the accuracy",
            )  # fmt: skip
        with self._mode(False), self.waiting.measurement(settles=True):
            if budget is None:
                report: Any = calibrate(self.compiled, loader, **_plain(options))
            else:
                report = calibrate_budget(self.compiled, loader, plain(budget), **_plain(options))
            self.settings = report.settings
            self.guarantee = guarantee_of(self, report)
        return report

    def budget_curve(self, loader: Iterable[Any], test_loader: Iterable[Any] | None = None, **options: Any) -> Any:
        """Budget against accuracy; see `eecompile.calibration.budget.budget_curve`."""
        with self._mode(False):
            return budget_curve(self.compiled, loader, test_loader, **_plain(options))

    def evaluate(self, loader: Iterable[Any], **options: Any) -> Any:
        """Accuracy against compute; see `eecompile.training.evaluate.evaluate`."""
        with self.waiting.measurement(settles=False):
            report = evaluate(self.compiled, loader, **_plain(options))
            report.guarantee = said(self)
            return report

    def benchmark(self, example: Any, **options: Any) -> Any:
        """Measured time against the original; see `eecompile.benchmark.benchmark`."""
        return benchmarks.benchmark(self, example, **_plain(options))

    def loss(self, result: Result, labels: Any) -> Tensor:
        """The strategy's objective on a result of `run` in train mode; with gates their price for `gate_mode` included.

        One objective for all calls: some keep means, and the price of a FLOP moves on.
        """
        kept = self.__dict__.setdefault("_objectives", {})
        if self.gate_mode not in kept:
            stages = (stage.objective for stage in self.strategy.stages if stage.gate_mode == self.gate_mode)
            price = next((spec for spec in stages if spec is not None), None)
            task = objective_of(self)
            chosen = task if price is None else Sum((task, resolve(price)))
            for other in kept.values():
                chosen.take(other.passed_on())
            kept[self.gate_mode] = chosen
        loss: Tensor = kept[self.gate_mode](result, labels)
        return loss

    def head_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the inserted heads, gates, routers and branches that the model does not have itself."""
        own = {id(p) for p in self.trunk_parameters()}
        parts = (self.heads, self.combination, self.gate_units, self.route_units)
        found = {id(p): p for part in parts for p in part.parameters()}
        return (p for i, p in found.items() if i not in own)

    def trunk_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the user's model, or of the copy of it that is trained."""
        return self.program.source.parameters()

    def own_trunk(self, in_place: bool = False) -> None:
        """Training the trunk changes copies of the model's weights from now on, and the user's model stays as it is.

        `fit` calls it before it trains the trunk; call it before your own training loop does, before you make the
        optimizer. With `in_place` the user's model is trained itself.

        Raises:
            EecompileError: The model cannot be copied.
        """
        if not in_place:
            copy_trunk(self)
        note = IN_PLACE if cast(Any, self).given is None else COPIED
        self.notes = (*(n for n in self.notes if n not in (IN_PLACE, COPIED)), note)

    @contextlib.contextmanager
    def prepare_training(self, trunk: bool) -> Iterator[None]:
        """Train mode with the trunk trainable or frozen; mode and flag are as before afterwards."""
        flag, training = self.train_trunk, self.training
        self.train_trunk = trunk
        try:
            self.train()
            self._training_graph()
            yield
        finally:
            self.train_trunk = flag
            self.train(training)

    @contextlib.contextmanager
    def _mode(self, training: bool) -> Iterator[None]:
        flags = {m: m.training for m in self.modules()}
        try:
            self.train(training)
            yield
        finally:
            for m, flag in flags.items():
                m.training = flag
            self.waiting.follow(self.training)

    @property
    def full_graph(self) -> fx.GraphModule:
        """The captured graph of the full model alone, with the weights that it has now."""
        if not self.program.models:
            return self.program.source
        cache = self.__dict__["_full"]
        if not cache:
            cache.append(facts.own_graph(self.program.source, self.program.signature))
        found: fx.GraphModule = cache[0]
        return found

    def _training_graph(self, way: int | None = None) -> fx.GraphModule:
        """The marked graph for training: trunk frozen in eval mode, or the train-mode capture; gates as `gate_mode` says.

        Args:
            way: The way that every row takes; None as `gate_mode` says.
        """
        graphs = self.__dict__["_training_graphs"]
        key = (self.train_trunk, self.gate_mode, self.gates_kept_open, self.gates_full_share, way)
        if key not in graphs:
            gm = with_decisions(self._hard_training_graph(), *key[1:])
            if any(r.rule == "stop" for r in self.program.halt_recipes):
                gm = with_every_step(gm, len(self.program.signature.outputs) + 2 + len(self.program.exits))
            graphs[key] = gm
        found: fx.GraphModule = graphs[key]
        found.train(self.training)
        return found

    def _hard_training_graph(self) -> fx.GraphModule:
        graphs = self.__dict__["_training_graphs"]
        if self.train_trunk not in graphs:
            if not self.train_trunk:
                graphs[False] = frozen_trunk(self.graph_module, set(map(id, self.trunk_parameters())))
            elif self.program.front_end == "blocks":
                graphs[True] = self.graph_module
            elif self.__dict__["_training_program"] is None:
                raise EecompileError(
                    "this program has no train-mode capture, so its trunk cannot be trained",
                    got="a loaded program that was saved without one",
                    wanted="trunk=False, or a program saved after training its trunk",
                    hint="save again from a strategy with trunk=True",
                )
            else:
                program = self.__dict__["_training_program"](self)
                assert program.marked is not None
                graphs[True] = program.marked
                self.__dict__["train_signature"] = program.signature
        hard: fx.GraphModule = graphs[self.train_trunk]
        return hard

    def train_mode_capture(self) -> None:
        """Captures the model in train mode now, so that the trunk can be trained after `load` too."""
        device = self.compiled.thresholds.device
        with self._mode(True):
            flag, self.train_trunk, drawn = self.train_trunk, True, random_state(device)
            try:
                self._training_graph()
            finally:
                restore_random_state(drawn, device)
                self.train_trunk = flag


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    return {name: plain(value) for name, value in options.items()}
