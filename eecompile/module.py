"""The compiled module: what `eecompile(model, ...)` gives. Called like the model, and inspected, trained and saved."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from eecompile import explain as explaining
from eecompile import wrapping
from eecompile.anytime import Anytime
from eecompile.artifact.write import write
from eecompile.costs import CostModel
from eecompile.device_programs import DevicePrograms
from eecompile.errors import EecompileError, StrategyError, near
from eecompile.export import ExportReport, export, verify_export
from eecompile.heads import Head
from eecompile.ir.settings import Settings
from eecompile.passes import facts
from eecompile.program import History, Program, Result
from eecompile.runtime.blocks import BlocksExecutor
from eecompile.runtime.changed import ModelWatch
from eecompile.runtime.compact import CompactExecutor
from eecompile.runtime.device.cuda import CudaExecutor
from eecompile.runtime.device.executor import Options, SimulateExecutor
from eecompile.runtime.devices import move_constants, other_device
from eecompile.runtime.dtypes import DtypeCheck
from eecompile.runtime.limits import Allowance
from eecompile.runtime.outcome import Executor, Outcome
from eecompile.runtime.precision import AutocastCheck, any_autocast
from eecompile.runtime.reference import ReferenceExecutor
from eecompile.signature import OtherDtypes
from eecompile.strategies.base import Strategy
from eecompile.waiting import Waiting

EXECUTORS = ("auto", "reference", "compact", "simulate", "device")
BACKENDS = ("eager", "inductor")


class CompiledModule(DevicePrograms, Anytime):
    """A model with early exits. `fast(x)` returns what `model(x)` returns; `fast.run(x)` says how.

    Args:
        program: A program at level "schedule".
        strategy: What inserted the exits.
        original: The user's model, None for a loaded program.
        captured_from: Where that is another module: all models of a cascade.
        example: Flat example inputs.
        training_program: Makes the train-mode program on demand, None where there is no way to it.
        artifact: The exported programs, by mode, for `save`.
        notes: What capture has to say.
        autocast: Names of dtypes under whose autocast the graph was found to be the model, as a saved program says.
    """

    original: nn.Module | None
    captured_from: nn.Module | None  # what the graphs were captured from: `original`, or all models of a cascade
    running: nn.Module | None  # whose weights run: `original`, or its copy once the trunk has been trained
    given: fx.GraphModule | None  # the model as given, once the trunk has been trained
    example: tuple[Tensor, ...] | None
    artifact: dict[str, Any]
    _chosen: Executor

    def __init__(
        self,
        program: Program,
        strategy: Strategy,
        *,
        executor: str = "auto",
        backend: str = "eager",
        original: nn.Module | None = None,
        captured_from: nn.Module | None = None,
        example: tuple[Tensor, ...] | None = None,
        training_program: Callable[[CompiledModule], Program] | None = None,
        artifact: Mapping[str, Any] | None = None,
        notes: Sequence[str] = (),
        autocast: Sequence[str] = (),
    ) -> None:
        super().__init__()
        if program.marked is None:
            raise EecompileError("a program must be marked before it can run", got=program.level)
        self.graph_module = program.marked
        self.program = program
        self.strategy = strategy
        self.notes = tuple(notes)
        # Kept out of nn.Module's registry: they share the parameters that graph_module registers.
        self.__dict__["original"] = self.__dict__["running"] = original
        self.__dict__["captured_from"] = original if captured_from is None else captured_from
        self.__dict__["given"] = None
        self.__dict__["example"] = example
        self.__dict__["_training_program"] = training_program
        self.__dict__["train_signature"] = None
        self.__dict__["artifact"] = dict(artifact or {})
        self.__dict__["_training_graphs"] = {}
        self.__dict__["_executors"] = {}
        self.__dict__["_lock"] = threading.RLock()
        self.__dict__["_device_options"] = Options()
        self._check_against(original, autocast)
        self.__dict__["cost_model"] = CostModel(program)
        self.__dict__["_references"] = weakref.WeakKeyDictionary()
        self.settings = program.settings
        self.__dict__["_full"] = []
        self.__dict__["waiting"] = Waiting(self)
        self.train_trunk = strategy.joint
        self._backend = self._valid("backend", backend, BACKENDS)
        self.executor = executor
        self.eval()

    def _check_against(self, model: nn.Module | None, autocast: Sequence[str] = ()) -> None:
        """Sets up what compares the graph with the Python model that it was captured from, during calls."""
        self.__dict__["autocast"] = AutocastCheck(self.program, model, autocast)
        self.__dict__["dtypes"] = DtypeCheck(self.program, model)
        self.__dict__["watch"] = ModelWatch(self.program, model)

    def follow_graphs(self) -> None:
        """Makes anew what was built from the program's graphs: they read other weights now."""
        for name in ("_references", "_full", "_executors"):
            self.__dict__[name].clear()
        self._check_against(self.running)
        self.executor = self.__dict__["_asked"]

    def replace_heads(self, heads: Mapping[str, tuple[nn.Module, float]]) -> None:
        """Other heads at exits: `{exit: (head, FLOPs of head and decision for one row)}`.

        A head is an `eecompile.heads.Head` for the value at its exit. Thresholds stay as they are.
        """
        exits = []
        for e in self.program.exits:
            if e.name in heads:
                head, flops = heads[e.name]
                branch = self.branch(e.name)
                branch.head, branch.takes_mask = head.train(branch.training), isinstance(head, Head)
                e = replace(e, head_kind=str(getattr(head, "kind", type(head).__name__)), head_flops=flops)
            exits.append(e)
        self.program = self.program.replace(exits=tuple(exits))
        self.__dict__["cost_model"] = CostModel(self.program)
        self.__dict__["_training_graphs"].clear()
        self.follow_graphs()

    def train(self, mode: bool = True) -> CompiledModule:
        """Train or eval mode. Exits and gates that wait to be trained are open in train mode; see `eecompile.waiting`."""
        super().train(mode)
        self.waiting.follow(mode)
        return self

    # ------------------------------------------------------------------ settings

    @property
    def settings(self) -> Settings:
        """Thresholds, temperatures and all else that may be set, as one value."""
        if not self._written():
            found: Settings = self.__dict__["_settings"]
            return found
        with self.__dict__["_lock"]:  # a state dict was loaded, somebody wrote to a buffer, or settings are being set now
            before: Settings = self.__dict__["_settings"]
            if self._written():
                written = dict(self.graph_module._buffers)
                self.settings = before  # stays, where what is written there is out of range
                self.settings = before.read_from(written)
            current: Settings = self.__dict__["_settings"]
            return current

    @settings.setter
    def settings(self, new: Settings) -> None:
        if new.families != self.program.settings.families:
            raise StrategyError(
                "these settings belong to another program", got=new.to_dict(), wanted=self.program.settings.to_dict()
            )
        device = facts.device_of(self.graph_module)
        with self.__dict__["_lock"]:
            for graph in (self.graph_module, self.program.graph_module):
                new.put_into(graph, device)
            buffers = self.graph_module._buffers
            attached = {f.buffer: t for f in new.families if (t := buffers[f.buffer]) is not None}
            self.__dict__["_settings"] = new
            self.__dict__["_attached"] = {name: (t, t._version) for name, t in attached.items()}

    def _written(self) -> bool:
        """Whether the buffers hold something else than the settings were put there as."""
        buffers = self.graph_module._buffers
        for name, (tensor, version) in self.__dict__["_attached"].items():
            now = buffers[name]
            if now is not tensor or now._version != version:
                return True
        return False

    # ------------------------------------------------------------------ running

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model would return, each row from the first exit that is sure enough.

        With `deadline_ms=` (milliseconds from now) or `budget=` (fraction of the full model's cost that no row may
        exceed) the best output until then; see `eecompile.anytime`.
        """
        if torch.compiler.is_compiling():
            return wrapping.untraced(self, args, kwargs)
        allowance = self._allowance(kwargs) if kwargs else None
        flat = self.flatten(args, kwargs)
        outcome = self._execute(flat, self.settings, False, allowance)
        output = self.program.restore(outcome.leaves, flat)
        self._close(outcome, allowance)
        return output

    def run(self, *args: Any, **kwargs: Any) -> Result:
        """The output with exit index, confidence and cost of every row.

        In train mode everything is computed, and `outputs`, `confidences` and `scores` of every exit are there too,
        differentiable. `deadline_ms=` and `budget=` as in a plain call.

        Raises:
            CaptureError: Other arguments than the model was captured with.
            StrategyError: A limit that is no number or cannot be kept.
        """
        allowance = self._allowance(kwargs) if kwargs else None
        flat = self.flatten(args, kwargs)
        settings = self.settings
        outcome = self._execute(flat, settings, True, allowance)
        result = self._result(outcome, settings, flat)
        if self.training and self.gate_mode == "every" and result.route_weights is not None:
            result.way_outputs = self._way_outputs(flat, settings)
        self._close(outcome, allowance, result)
        return result

    def observe(self, *args: Any, **kwargs: Any) -> Result:
        """Like `run`, but with every exit computed, in eval mode and without gradients.

        `gates` and `steps` are still what `run` would tell: a row that left passes no later gate. `gate_scores` are there
        for every row; with exits closed first (`set_thresholds(2.0)`) every gate decides about every row.
        """
        with self._mode(False):
            return self.observe_at(self.settings, args, kwargs)

    def observe_at(self, settings: Settings, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Result:
        """`observe` under other settings than those of the module, which stay."""
        flat = self.flatten(args, kwargs)
        with torch.no_grad(), self._mode(False):
            return self._result(self._reference().run(flat, settings), settings, flat)

    def full(self, *args: Any, **kwargs: Any) -> Any:
        """The output of the model as it was given, without any exit."""
        flat = self.flatten(args, kwargs)
        with torch.no_grad():
            return self.program.signature.restore(list((self.given or self.full_graph)(*flat)), flat)

    def flatten(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """The tensors of a call in graph order; `CaptureError` where the graph does not take it, or is not the model."""
        try:
            flat = self.program.signature.flatten(args, kwargs)
        except OtherDtypes as error:
            flat = self.__dict__["dtypes"](error)
        self.__dict__["watch"](flat)
        if any_autocast():
            self.__dict__["autocast"](flat)
        return flat

    def _execute(
        self, flat: Sequence[Tensor], settings: Settings, want_confidence: bool, allowance: Allowance | None = None
    ) -> Outcome:
        try:
            if self.training:
                graph = self._training_graph()
                if self.train_trunk and self.train_signature is not None:
                    self.train_signature.check(flat)
                return self._reference(graph).run(flat, settings)
            return self._chosen.run(flat, settings, want_confidence, allowance)
        except RuntimeError as error:
            elsewhere = other_device(self.program.signature, flat, self.thresholds.device)
            if elsewhere is None:
                raise
            raise elsewhere from error

    def _way_outputs(self, flat: Sequence[Tensor], settings: Settings) -> tuple[Tensor, ...]:
        graphs = [self._training_graph(way) for way in range(len(self.program.routes[0].ways))]
        with torch.no_grad():
            outcomes = [self._reference(graph).run(flat, settings) for graph in graphs]
        return tuple(o.outputs[-1] for o in outcomes if o.outputs is not None)

    def _result(self, outcome: Outcome, settings: Settings, flat: Sequence[Tensor]) -> Result:
        costs = self.cost_model
        training = outcome.outputs is not None and self.training
        gates = self._told(outcome, "") if self.program.gates else None
        if gates is not None and not training:  # nothing runs of a cascade's model while its exits are closed
            gates = gates * costs.gates_run(costs.is_open(settings), gates.device)
        steps = costs.steps_ran(settings, outcome.reports, outcome.exit_index, self.training)
        route = self.taken(outcome.reports, outcome.exit_index, settings)
        mixed = training and self.gate_mode == "soft"
        ways = None if route is None else self.ways_of(outcome.reports, route, mixed)
        result = Result(
            output=self.program.restore(outcome.leaves, flat),
            exit_index=outcome.exit_index,
            confidence=outcome.confidence if outcome.confidence is not None else torch.zeros(()),
            cost=costs.spent(settings, outcome.exit_index, gates, steps, ways),
            gates=gates if gates is None or training else gates >= 0.5,
            gate_scores=self._told(outcome, ".score") if self.program.gates and outcome.outputs is not None else None,
            route=route,
            steps=self._steps(gates),
            final=torch.ones_like(outcome.exit_index, dtype=torch.bool) if outcome.final is None else outcome.final,
            stopped=outcome.stopped,
            late=outcome.late,
        )
        if gates is not None and self.program.widths:
            result.widths = costs.widths_ran(gates, outcome.exit_index)
        if steps:
            self._tell_halting(result, [outcome.reports[h.name] for h in self.program.halts], steps)
        if gates is not None and outcome.outputs is not None:
            result.gates_free = self.gates_free(gates)
        if (gates is not None or ways is not None) and outcome.outputs is not None:
            result.end_cost = costs.at_end(settings, outcome.exit_index, gates, steps, ways)
        if route is not None and outcome.outputs is not None:
            result.route_weights = outcome.reports[f"{self.program.routes[0].name}.weights"]
            result.route_costs = costs.at_routes(settings)
        if outcome.step_scores is not None and outcome.outputs is not None:
            result.step_outputs = (*outcome.step_outputs, outcome.outputs[-1])
            result.step_scores = outcome.step_scores.float()
        if outcome.outputs is not None and outcome.confidences is not None:
            result.outputs = outcome.outputs
            result.confidences = tuple(torch.nan_to_num(c, nan=0.0) for c in outcome.confidences)
            result.separate = outcome.separate
            result.scores = None if outcome.scores is None else tuple(s.flatten() for s in outcome.scores)
            if self.program.exits and self.program.exits[0].routed:  # not a function of the outputs: kept as they are
                result.scores = result.confidences[:-1]
        return result

    def _tell_halting(self, result: Result, ledgers: Sequence[Tensor], steps: Sequence[Tensor]) -> None:
        """Steps and ponder cost; a row that left inside a chain has the steps that it ran, and no ponder cost of it."""
        counts = []
        for h, ledger, ran in zip(self.program.halts, ledgers, steps, strict=True):
            count, taken = ledger.detach()[..., 1], (ran > 0).sum(1).to(ledger.dtype)
            left = torch.zeros_like(taken, dtype=torch.bool)
            if not self.training:
                left = (result.exit_index < h.stage) | (ran[:, 0] == 0)
            rows = (-1, *(1,) * (count.ndim - 1))
            counts.append(torch.where(left.view(rows), taken.view(rows), count))
        result.steps = torch.stack(counts).sum(0).long()
        ran_at_all = [r[:, 0].view(-1, *(1,) * (ledger.ndim - 2)) for r, ledger in zip(steps, ledgers, strict=True)]
        result.ponder = torch.stack([ledger[..., 2] * r for r, ledger in zip(ran_at_all, ledgers, strict=True)]).sum(0)

    def _told(self, outcome: Outcome, suffix: str) -> Tensor:
        """[B, G] of what every gate reports."""
        return torch.stack([outcome.reports[g.name + suffix] for g in self.program.gates], 1)

    def _steps(self, gates: Tensor | None) -> Tensor | None:
        """[B] int64: gated blocks that ran for each row; None where gates are on parts of blocks."""
        kinds = [g.kind for g in self.program.gates]
        blocks = [i for i, kind in enumerate(kinds) if kind in ("block", "branch")]
        if gates is None or not blocks or any(kind not in ("block", "branch", "width") for kind in kinds):
            return None
        return (gates[:, self.cost_model.constant(blocks, gates.device, torch.int64)] >= 0.5).sum(1)

    def gates_free(self, gates: Tensor) -> Tensor:
        """[B, G] bool: where the gate's own score decided; see `Result.gates_free`. `gates` [B, G], 1 for open."""
        curriculum = (self.gates_kept_open, self.gates_full_share) if self.training else (0, 0.0)
        return self.cost_model.gates_free(self.settings, gates, *curriculum)

    def prediction_of(self, output: Any) -> Tensor:
        """The class scores within an output of the model's type."""
        assert self.program.prediction is not None
        return self.program.signature.flatten_output(output)[self.program.prediction]

    # ------------------------------------------------------------------ executors

    @property
    def executor(self) -> str:
        """Name of the executor that runs in eval mode."""
        return self._chosen.name

    @executor.setter
    def executor(self, name: str) -> None:
        self._valid("executor", name, EXECUTORS)
        found = self._executor(self._automatic()[0] if name == "auto" else name)
        self.__dict__["_asked"], self.__dict__["_chosen"] = name, found

    @property
    def executor_reason(self) -> str:
        asked = self.__dict__["_asked"]
        why = self._automatic()[1] if asked == "auto" else f"asked for {asked!r}"
        return f"{why}; {self._chosen.support.reason}" if isinstance(self._chosen, CudaExecutor) else why

    @property
    def backend(self) -> str:
        """ "eager" or "inductor": how the compact executor's segments run."""
        return self._backend

    @backend.setter
    def backend(self, name: str) -> None:
        self._backend = self._valid("backend", name, BACKENDS)
        self.executor = self.__dict__["_asked"]

    def _executor(self, name: str) -> Executor:
        executors = self.__dict__["_executors"]
        key = (name, self._backend)
        with self.__dict__["_lock"]:
            if key not in executors:
                if name == "reference":
                    executors[key] = self._reference()
                elif name == "simulate":
                    executors[key] = SimulateExecutor(self.program, self.device_options)
                elif name == "device":
                    executors[key] = CudaExecutor(self.program, self.device_options)
                elif self.program.front_end == "blocks":
                    executors[key] = BlocksExecutor(self.program)
                else:
                    executors[key] = CompactExecutor(self.program, self._backend)
        found: Executor = executors[key]
        return found

    def _reference(self, marked: fx.GraphModule | None = None) -> ReferenceExecutor:
        """The reference executor of a marked graph, the program's own or one for training."""
        marked = marked or self.graph_module
        references = self.__dict__["_references"]
        if marked not in references:
            references[marked] = ReferenceExecutor(self.program, marked)
        found: ReferenceExecutor = references[marked]
        return found

    @staticmethod
    def _valid(what: str, name: str, valid: Sequence[str]) -> str:
        if name not in valid:
            raise StrategyError(f"unknown {what}", got=repr(name), wanted=near(str(name), valid))
        return name

    # ------------------------------------------------------------------ graphs and reports

    @property
    def source_graph(self) -> fx.GraphModule:
        """The captured graph, before any rewrite."""
        return self.program.source

    @property
    def history(self) -> History:
        """The graph after every pass."""
        return self.program.history

    def explain(self) -> explaining.Explanation:
        """What was found, inserted and refused, and which executor runs and why."""
        return explaining.explain(self)

    @property
    def title(self) -> str:
        """What was compiled, for people: the model's class, or the models of a cascade."""
        if self.program.models:
            return f"cascade of {', '.join(self.program.models)}"
        return type(self.original).__name__ if self.original is not None else "loaded program"

    def __str__(self) -> str:
        return str(self.explain())

    def __repr__(self) -> str:
        count = len(self.program.exits)
        return f"CompiledModule({self.title}, {self.strategy.name}, {count} exits, executor={self.executor!r})"

    # ------------------------------------------------------------------ moving and saving

    def _apply(self, fn: Any, recurse: bool = True) -> CompiledModule:
        for dtype in {t.dtype for t in (*self.parameters(), *self.buffers()) if t.is_floating_point()}:
            probe = fn(torch.zeros(1, dtype=dtype, device=self.thresholds.device))
            if probe.dtype != dtype:
                raise EecompileError(
                    "a compiled module keeps the dtype that it was captured in",
                    got=str(probe.dtype),
                    wanted=f"{dtype}: a move to another device only",
                    hint=f"convert the model first, then compile it: eecompile(model.to({probe.dtype}), ...)",
                )
        settings = self.settings
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.given is not None:
            self.given._apply(fn, recurse)  # type: ignore[no-untyped-call]
        device = facts.device_of(self.graph_module)
        for gm in (self.program.source, self.program.graph_module, *self.__dict__["_training_graphs"].values()):
            _rebind(gm, self.graph_module)
        for gm in (self.graph_module, self.program.source, self.program.graph_module):
            move_constants(gm, device)
        self.__dict__["_training_graphs"].clear()
        self.__dict__["_references"].clear()
        self.__dict__["_full"].clear()
        self.settings = settings
        for executor in self.__dict__["_executors"].values():
            executor.reset()
        return self

    def save(self, path: Any) -> None:
        """Writes a directory that `eecompile.load` reads; see `eecompile.artifact.write`."""
        write(self, path)

    def export(self, path: Any, target: str = "pt2") -> Path:
        """Writes a file that runs without Python, with the savings of its exits; see `eecompile.export`."""
        return export(self.program, self.settings, path, target)

    def verify_export(self, path: Any, loader: Iterable[Any], **options: Any) -> ExportReport:
        """Runs what `export` wrote in its runtime and compares it with the reference; see `eecompile.export.verify`."""
        return verify_export(self.program, self.settings, path, loader, **options)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return wrapping.deep_copy(self, memo)

    def __copy__(self) -> Any:
        return wrapping.shallow_copy(self)

    def _slow_forward(self, *args: Any, **kwargs: Any) -> Any:
        raise wrapping.traced("torch.jit.trace")

    def _replicate_for_data_parallel(self) -> Any:
        raise wrapping.no_replicas()


def _rebind(gm: fx.GraphModule, source: fx.GraphModule) -> None:
    """Buffers of `gm` are those of `source` again, by name: moving a module replaces buffers."""
    for name, tensor in source.named_buffers():
        parent, _, leaf = name.rpartition(".")
        try:
            owner = gm.get_submodule(parent)
        except AttributeError:
            continue
        if leaf in owner._buffers:
            owner._buffers[leaf] = tensor
