"""The training loop of `fit`: stages, epochs, steps, checkpoints, Ctrl-C.

Between two steps the whole state is a `Position` (where in the data), the trained parameters and all
buffers, the optimizer's and scheduler's state, and the random generators. That is what a checkpoint holds.
Every epoch starts from generators seeded by (seed, epoch), so the order of the data can be made again: a
resumed run reads and drops the batches that were seen, puts the generators where they were and goes on.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from eecompile.errors import EecompileError
from eecompile.ir.settings import GATES
from eecompile.training.batches import Batch, batches, device_of, empty_loader, iterate, length_of, no_labels, split
from eecompile.training.cache import Cache
from eecompile.training.checkpoint import Checkpoints, resumed
from eecompile.training.features import Collector, Features, NotCached
from eecompile.training.fit_report import EpochRow, FitReport
from eecompile.training.head_choice import Choice, heads_alone, why_not, with_kinds
from eecompile.training.head_report import HeadRow
from eecompile.training.interrupt import Interrupt, say
from eecompile.training.objectives import outputs_of
from eecompile.training.optim import freeze, make_optimizer, make_scheduler, parameter_groups
from eecompile.training.plan import Event, Plan, Position, StagePlan
from eecompile.training.progress import Bar
from eecompile.training.scores import check_finite
from eecompile.training.settings import settings, trained_tensors
from eecompile.training.stages import gates_deciding
from eecompile.training.state import decode, encode, random_state, reseed, restore_random_state
from eecompile.training.step import Step, sums
from eecompile.training.tasks import loss_said
from eecompile.training.workers import make_accelerator, of_the_first, only_trained_is_reduced, shard, shared, whole

if TYPE_CHECKING:
    from eecompile.module import CompiledModule

_END = object()


class Loop:
    """One call of `fit`. `run` does it all."""

    def __init__(
        self,
        fast: CompiledModule,
        loader: Iterable[Any],
        val_loader: Iterable[Any] | None,
        plan: Plan,
        checkpoints: Checkpoints | None,
        accelerator: Any = None,
    ) -> None:
        self.fast, self.val_loader, self.plan, self.checkpoints = fast, val_loader, plan, checkpoints
        self.accelerator = make_accelerator(accelerator)
        self.device = device_of(fast)
        self.loader = shard(self.accelerator, loader)
        self.at = Position()
        self.rows: list[EpochRow] = []
        self.objective = plan.objective_in(plan.stages[0])
        self.best: dict[str, Tensor] = {}
        self.restored: dict[str, Any] | None = None
        self.interrupt = Interrupt()
        self.resumed_from: int | None = None
        self.saved_at: tuple[int, int] | None = None
        self.trained = trained_tensors(fast, plan)
        self.why_not: dict[str, str] = {
            s.name: why_not(fast, plan, s, self.accelerator.num_processes) for s in plan.stages if heads_alone(s)
        }
        self.insisted()
        fitted = not all(self.why_not.values())
        self.settings = settings(fast, plan, self.loader, self.accelerator, self.trained, fitted)
        self.optimizer: Any = None
        self.scheduler: Any = None
        self.heads: list[HeadRow] = []
        self.features: dict[str, Any] = {}

    def run(self, resume: bool | str) -> FitReport:
        self.started = started = time.perf_counter()
        random_before, mode = random_state(self.device), self.fast.training
        for parameter in self.fast.parameters():  # gradients that are there already are not part of the first step
            parameter.grad = None
        try:
            with self.interrupt, Bar(self.plan, self.accelerator, length_of(self.loader)) as self.bar:
                for stage in self.plan.stages:
                    self.plan.objective_in(stage).load_state({})
                self._resume(resume)
                while self.at.stage < len(self.plan.stages):
                    stage = self.plan.stages[self.at.stage]
                    if not self._fitted(stage):
                        self._stage(stage)
                    self.at.next_stage()
                    for following in self.plan.stages[self.at.stage : self.at.stage + 1]:
                        self.plan.objective_in(following).take(self.plan.objective_in(stage).passed_on())
                if self.interrupt.requested:
                    self._interrupted()
        finally:
            restore_random_state(random_before, self.device)
            self.fast.train(mode)
            for parameter in self.fast.parameters():
                parameter.grad = None
        return FitReport(
            rows=self.rows,
            exits=[record.name for record in self.fast.exits],
            gates=list(self.fast.settings.to_dict().get(GATES, ())),
            routes=list(getattr(self.fast, "route_names", ())),
            score="accuracy" if self.plan.metric is None else "metric",
            objective=self.plan.objective.to_dict(),
            task=self.plan.task,
            loss=loss_said(self.fast, self.plan.task),
            steps=self.at.step,
            resumed_from=self.resumed_from,
            stopped_early=self.at.stopped_early,
            best_epoch=self.at.best_epoch,
            checkpoint=str(self.checkpoints.latest) if self.checkpoints is not None else None,
            seconds=time.perf_counter() - started,
            heads=self.heads,
            batch_by_batch=next(filter(None, self.why_not.values()), ""),
            **self.features,
        )

    def insisted(self) -> None:
        """An error where features were to be kept, or drawn, and cannot be."""
        reasons = [*filter(None, self.why_not.values())] or ([] if self.why_not else ["no stage trains heads alone"])
        for name, asked in (("cached=True", self.plan.cached), ("draws=", self.plan.draws is not None)):
            if asked and reasons:
                raise EecompileError(
                    "heads cannot be fitted on kept features", where=name, got=reasons[0], hint=f"leave {name} out"
                )

    # --- heads on kept features -------------------------------------------------------------------------------

    def _fitted(self, stage: StagePlan) -> bool:
        """Fits the heads of a stage on features that are kept; False where they are trained batch by batch."""
        if self.why_not.get(stage.name, "batch by batch"):
            return False
        if self.at.stage_done:  # before the run was resumed
            return True
        started = time.perf_counter()
        self.objective = self.plan.objective_in(stage)
        with ExitStack() as stack:
            stack.enter_context(self.fast.prepare_training(False))
            cache = stack.enter_context(Cache(self.plan.cache_mb * 2**20))
            choice = Choice(self.fast, self.plan, self.objective)
            try:
                features = self._collect(choice, cache)
            except NotCached as reason:
                if self.plan.cached or iter(iterate(self.loader)) is self.loader:
                    raise EecompileError(
                        "heads cannot be fitted on kept features", got=str(reason), hint="pass cached=False"
                    ) from reason
                self.why_not[stage.name] = str(reason)
                return False
            self.fast.train()
            self._fit_each(stage, choice, features)
            self._fitted_row(stage, choice, features, started)
        return True

    def _collect(self, choice: Choice, cache: Cache) -> Features:
        self.fast.eval()
        collector = Collector(
            self.fast, choice.slots, self.objective, cache, self.plan.draws, self.plan.epochs, self.plan.seed
        )
        self.bar.begin("features")
        return collector.run(self.loader, self.val_loader, self.device, self._advanced)

    def _advanced(self) -> None:
        self.bar.advance()
        if self.interrupt.requested:
            self._interrupted()

    def _fit_each(self, stage: StagePlan, choice: Choice, features: Features) -> None:
        self.bar.begin("heads", len(choice.slots))
        for k in range(self.at.batch, len(choice.slots)):
            now = time.perf_counter()
            row = choice.fit(features, k, now + (self.started + self.plan.seconds - now) / (len(choice.slots) - k))
            self.heads.append(row)
            self.at.batch, self.at.step = k + 1, self.at.step + row.steps
            self.trained = trained_tensors(self.fast, self.plan)
            self.bar.advance()
            if self.interrupt.requested:
                self._interrupted()
            self._save()
            self._notify(Event("step", stage.name, len(self.rows) + 1, self.at.batch, self.at.step, row.loss))

    def _fitted_row(self, stage: StagePlan, choice: Choice, features: Features, started: float) -> None:
        loss, scores = choice.measured(features, False)
        row = EpochRow(stage.name, len(self.rows) + 1, self.at.step, loss, scores, self.plan.lr, 0.0)
        if self.val_loader is not None:
            row.val_loss, row.val_scores = choice.measured(features, True)
        row.seconds = time.perf_counter() - started
        self.rows.append(row)
        self.features = {"held_out": features.held_rows, "draws": features.draws, "notes": [*features.notes]}
        if features.draws == 1 < self.plan.epochs:
            self.features["notes"].append(f"epochs={self.plan.epochs} sets no limit there, so the stage is one row")
        self.at.next_epoch()
        self.at.stage_done = True
        self._save()
        self._notify(Event("epoch", stage.name, row.epoch, 0, self.at.step, row.loss, row))
        if self.interrupt.requested:
            self._interrupted()

    # --- stages, epochs, steps ----------------------------------------------------------------------------

    def _stage(self, stage: StagePlan) -> None:
        with ExitStack() as stack:
            self.objective = self.plan.objective_in(stage)
            if stage.gate_mode is not None:
                stack.enter_context(gates_deciding(self.fast, stage.gate_mode, stage.kept_open, stage.full_share))
            stack.enter_context(self.fast.prepare_training(stage.trunk))
            self.fast.train()
            heads = list(self.fast.head_parameters())
            if not stage.heads:
                stack.callback(freeze(heads))
            raw = make_optimizer(self.plan, parameter_groups(self.fast, self.plan, stage))
            self.parameters = [p for group in raw.param_groups for p in group["params"]]
            step = Step(self.fast, self.objective, self.plan.metric, final_only=not stage.heads)
            only_trained_is_reduced(step, self.parameters)
            self.module, self.optimizer = self.accelerator.prepare(step, raw)
            self.scheduler = make_scheduler(self.plan, raw, stage, self.loader)
            if self.restored is not None:
                raw.load_state_dict(self.restored["optimizer"])
                if self.scheduler is not None:
                    self.scheduler.load_state_dict(self.restored["scheduler"])
                self.restored = {"random": self.restored["random"]} if self.at.batch else None
            while self.at.epoch < stage.epochs and not self.at.stage_done:
                self._epoch(stage, raw)
            if self.best:
                self._load(self.best)
                self.best = {}
            of_the_first(self.trained.values())

    def _epoch(self, stage: StagePlan, raw: torch.optim.Optimizer) -> None:
        started = time.perf_counter()
        reseed(self.plan.seed, len(self.rows), int(self.accelerator.process_index), self.loader)
        items = iterate(self.loader)
        if self.at.batch:
            self._skip(items)
        self.bar.epoch(stage, self.at, len(self.rows) + 1)
        while (item := self._next(items)) is not _END:
            loss = self._step(split(item, self.at.batch, self.device))
            self.at.batch += 1
            self.at.step += 1
            if self.interrupt.requested:
                self._interrupted()
            if self.plan.checkpoint_every and self.at.step % self.plan.checkpoint_every == 0:
                self._save()
            self.bar.step(self.at, loss)
            self._notify(Event("step", stage.name, len(self.rows) + 1, self.at.batch, self.at.step, loss))
        if self.at.batch == 0:
            raise empty_loader("the training loader")
        self._gather(everywhere=True)
        if "scores" in self.at.sums and not self.at.score_rows:
            raise no_labels("the training loader")
        row = EpochRow(
            stage=stage.name,
            epoch=len(self.rows) + 1,
            steps=self.at.step,
            loss=self.at.loss_sum / max(self.at.loss_rows, 1),
            scores=self.at.scores(),
            lr=float(raw.param_groups[0]["lr"]),
            seconds=0.0,
        )
        row.take(self.at.decided())
        if self.val_loader is not None:
            self._validate(self.val_loader, stage, row)
        row.seconds = time.perf_counter() - started
        self.rows.append(row)
        self.at.next_epoch()
        self._watch(row)
        self._save()
        self._notify(Event("epoch", stage.name, row.epoch, 0, self.at.step, row.loss, row))
        if self.interrupt.requested:
            self._interrupted()

    def _step(self, batch: Batch) -> float:
        loss, rows, found = self.module(batch)
        value = float(loss.detach())
        alone = self.accelerator.num_processes == 1  # otherwise every rank finds out from the common gradient
        if alone and not math.isfinite(value):
            raise self._diverged("the loss is not finite", value, batch)
        self.accelerator.backward(loss)
        norm = None
        if self.plan.max_grad_norm is not None:
            norm = self.accelerator.clip_grad_norm_(self.parameters, self.plan.max_grad_norm)
        elif self.accelerator.scaler is None:
            norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        if norm is not None and self.accelerator.scaler is None and not math.isfinite(float(norm)):
            raise self._diverged("the gradient is not finite", float(norm), batch)
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.at.add(value, rows, found)
        return value

    def _next(self, items: Any) -> Any:
        try:
            return next(items, _END)
        except KeyboardInterrupt:  # raised by the loader itself: the state between two steps is whole
            self._interrupted()

    def _skip(self, items: Any) -> None:
        for seen in range(self.at.batch):
            if next(items, _END) is _END:
                raise EecompileError(
                    "the loader is shorter than when the checkpoint was written",
                    got=f"{seen} batches",
                    wanted=f"more than {self.at.batch}",
                    hint="use the same data, or pass resume=False",
                )
        if self.restored is not None:
            restore_random_state(self.restored["random"], self.device)
            self.restored = None

    def _validate(self, loader: Iterable[Any], stage: StagePlan, row: EpochRow) -> None:
        """Fills in the validation figures of `row`."""
        seen = Position()

        def measured(batch: Batch) -> tuple[Any, ...]:
            where = f"batch {batch.index} of val_loader"
            result = self.fast.observe(*batch.args, **batch.kwargs)
            check_finite(outputs_of(result), self.fast.exits, where)
            with torch.no_grad():
                measure = self.objective if stage.heads else self.objective.final
                loss = float(measure(result, batch.labels, where=where))
            return loss, *sums(self.fast, result, batch.labels, self.objective, self.plan.metric, where)

        for _, found in shared(batches(whole(loader), self.device), measured):
            seen.add(*found)
            if self.interrupt.requested:
                self._interrupted()
        self.fast.train()
        if seen.loss_rows == 0:
            raise empty_loader("val_loader")
        if "scores" in seen.sums and not seen.score_rows:
            raise no_labels("val_loader")
        row.val_loss, row.val_scores = seen.loss_sum / seen.loss_rows, seen.scores()
        row.take(seen.decided(), "val_")

    def _watch(self, row: EpochRow) -> None:
        """Early stopping on the validation loss; NaN is never better."""
        if self.plan.patience is None or row.val_loss is None:
            return
        if self.at.best_loss is None or row.val_loss < self.at.best_loss:
            self.at.best_loss, self.at.best_epoch, self.at.bad_epochs = row.val_loss, row.epoch, 0
            self.best = {name: tensor.detach().clone() for name, tensor in self.trained.items()}
        else:
            self.at.bad_epochs += 1
            if self.at.bad_epochs >= self.plan.patience:
                self.at.stage_done = self.at.stopped_early = True

    def _notify(self, event: Event) -> None:
        for callback in self.plan.callbacks:
            try:
                callback(event)
            except KeyboardInterrupt:
                self._interrupted()

    # --- checkpoints --------------------------------------------------------------------------------------

    def _save(self) -> None:
        if self.checkpoints is None or self.saved_at == (self.at.step, len(self.rows)):
            return
        self._gather()
        self.saved_at = (self.at.step, len(self.rows))
        if not self.accelerator.is_main_process:
            return
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        tensors: dict[str, Tensor] = {}
        state = {
            "settings": self.settings,
            "position": asdict(self.at),
            "rows": [asdict(row) for row in self.rows],
            "heads": [asdict(row) for row in self.heads],
            "features": self.features,
            "trained": encode(self.trained, tensors, "trained"),
            "best": encode(self.best, tensors, "best"),
            "optimizer": encode(optimizer and optimizer.state_dict(), tensors, "optimizer"),
            "scheduler": encode(self.scheduler and self.scheduler.state_dict(), tensors, "scheduler"),
            "random": encode(random_state(self.device), tensors, "random"),
            "objective": encode(self.objective.state(), tensors, "objective"),
        }
        self.checkpoints.save(self.at.step, len(self.rows), state, tensors)

    def _resume(self, resume: bool | str) -> None:
        if self.checkpoints is None:
            if resume == "must":
                raise EecompileError("there is no checkpoint to resume from", hint="pass checkpoint_dir")
            return
        found = resumed(self.checkpoints, resume, self.settings)
        if found is None:
            return
        state, tensors = found
        self.heads = [HeadRow(**row) for row in state["heads"]]
        self.features = state["features"]
        if self.heads:
            with_kinds(self.fast, self.heads)
            self.trained = trained_tensors(self.fast, self.plan)
        self._load(decode(state["trained"], tensors))
        self.best = decode(state["best"], tensors)
        self.at = Position(**state["position"])
        self.rows = [EpochRow.read(row) for row in state["rows"]]
        self.objective = self.plan.objective_in(self.plan.stages[self.at.stage])
        self.objective.load_state(decode(state["objective"], tensors) if "objective" in state else {})
        self.restored = {key: decode(state[key], tensors) for key in ("optimizer", "scheduler", "random")}
        self.resumed_from, self.saved_at = self.at.step, (self.at.step, len(self.rows))

    def _load(self, saved: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, tensor in self.trained.items():
                tensor.copy_(saved[name])

    def _gather(self, everywhere: bool = False) -> None:
        """With several processes: the sums of all of them, in the main one, which goes on with them, or in each."""
        if self.accelerator.num_processes > 1:
            total = self.accelerator.reduce(self.at.packed().to(self.accelerator.device), "sum").cpu()
            self.at.unpack(total if everywhere or self.accelerator.is_main_process else total * 0)

    # --- ends ---------------------------------------------------------------------------------------------

    def _interrupted(self) -> None:
        self._save()
        done = f"stopped by Ctrl-C after step {self.at.step}"
        if self.checkpoints is None:
            text = f"{done}; the trained parameters stay in memory. With checkpoint_dir= a run can be resumed."
        else:
            text = (
                f"{done}; checkpoint: {self.checkpoints.latest}\n"
                f"to resume: the same call, fit(..., checkpoint_dir={str(self.checkpoints.directory)!r})"
            )
        if self.accelerator.is_main_process:
            say(text)
        raise KeyboardInterrupt(text)

    def _diverged(self, what: str, value: float, batch: Batch) -> EecompileError:
        kept = "no checkpoint was asked for"
        if self.checkpoints is not None:
            kept = f"last checkpoint: {self.checkpoints.latest}"
        return EecompileError(
            what,
            where=f"{batch.where}, epoch {len(self.rows) + 1}, step {self.at.step + 1}",
            got=value,
            wanted="a finite number; the parameters are those before this step",
            hint=f"look at the inputs of this batch, lower lr, or pass max_grad_norm=1.0; {kept}",
        )
