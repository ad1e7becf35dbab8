"""The compiled module: what `eecompile(model, ...)` gives. Called like the model, and inspected, trained and saved."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from eecompile import anytime, wrapping
from eecompile import benchmark as benchmarks
from eecompile import explain as explaining
from eecompile import own_trunk as trunks
from eecompile import public_records as records
from eecompile import result as results
from eecompile.artifact.write import write
from eecompile.calibration.budget import budget_curve, calibrate_budget
from eecompile.calibration.calibrate import calibrate
from eecompile.calibration.guarantee import Guarantee, guarantee_of, said
from eecompile.calibration.monitor import Monitor, MonitorOptions
from eecompile.capture.adapter import mode
from eecompile.costs import CostModel
from eecompile.criteria import MaxProbability
from eecompile.errors import CalibrationError, CaptureError, EecompileError, StrategyError, check_name, shown
from eecompile.export import ExportReport, export, stage_inputs, verify_export
from eecompile.heads import Branch, Head
from eecompile.ir import settings as families
from eecompile.ir.settings import Settings
from eecompile.passes.insert_exits import COMBINATION, HEADS
from eecompile.passes.place_gates import GATES
from eecompile.passes.place_routes import ROUTES
from eecompile.passes.training_decisions import TrainMode
from eecompile.plain import arguments, check_kind, check_switches, plain
from eecompile.program import History, Program
from eecompile.report import plot, report
from eecompile.result import Result
from eecompile.runtime.confidences import confidences_of
from eecompile.runtime.device.check import NoSync
from eecompile.runtime.device.executor import Options
from eecompile.runtime.device.nodes import DeviceProgram
from eecompile.runtime.devices import other_device
from eecompile.runtime.engine import Engine
from eecompile.runtime.entry import Entry
from eecompile.runtime.limits import Allowance, Limits
from eecompile.runtime.live_settings import LiveSettings
from eecompile.runtime.origin import Origin
from eecompile.runtime.outcome import Outcome
from eecompile.runtime.timing import StageTimes
from eecompile.strategies.base import Strategy
from eecompile.training.evaluate import evaluate
from eecompile.training.fit import fit, loss_of
from eecompile.training.graphs import TrainingGraphs
from eecompile.training.objectives import Objective
from eecompile.training.tasks import TASKS
from eecompile.with_labels import LABELS, NamedForward, takes_labels, with_loss


@dataclass
class Seen:
    """What `evaluate` saw last, for `explain`.

    Attributes:
        steps: Mean steps of a row, where rows halt.
        routes: Where rows went, where there is a router.
    """

    steps: float | None = None
    routes: list[dict[str, Any]] = field(default_factory=list)


class CompiledModule(nn.Module):
    """A model with early exits. `fast(x)` returns what `model(x)` returns; `fast.run(x)` says how.

    Args:
        program: A program at level "schedule".
        strategy: What inserted the exits.
        executor: "auto" or the name of an executor.
        backend: "eager", "inductor" or "onnxruntime".
        origin: What the program was made from.

    Attributes:
        graph_module: The rewritten graph; it owns the parameters.
        live: Settings under eval and train mode.
        cost_model: Costs of rows.
        engine: Executors.
        training_graphs: Graphs for train mode.
        train_mode: What train mode trains, and how gates decide in it.
        guarantee: Of the last `calibrate`; `explain` says whether it still holds.
        digest: Of the weights, with what they were then, for the guarantee.
    """

    accepts_loss_kwargs = False  # of transformers.Trainer: `num_items_in_batch` among the arguments
    graph_module: fx.GraphModule

    def __init__(
        self,
        program: Program,
        strategy: Strategy,
        *,
        executor: str = "auto",
        backend: str = "eager",
        origin: Origin | None = None,
    ) -> None:
        super().__init__()
        if program.marked is None:
            raise EecompileError("a program must be marked before it can run", got=program.level)
        self.graph_module = program.marked
        self.program = program
        self.strategy = strategy
        self.origin = origin or Origin()
        self.entry = Entry(program, self.origin.running, self.origin.captured, self.origin.autocast)
        self.live = LiveSettings(program)
        self.cost_model = CostModel(program)
        self.engine = Engine(program, executor, backend)
        self.train_mode = TrainMode(trunk=strategy.joint)
        self.training_graphs = TrainingGraphs(program, self.origin, strategy.recipe().equilibrium)
        self.objectives: dict[str, Objective] = {}
        self._task: str | None = None
        self.guarantee: Guarantee | None = None
        self.digest: tuple[list[Any], str] | None = None
        self.seen = Seen()
        self.eval()

    # ------------------------------------------------------------------ running

    @NamedForward
    def forward(self, *args: Any, labels: Any = None, **kwargs: Any) -> Any:
        """What the model would return, each row from the first exit that is sure enough.

        With `labels=`, as `fit` takes them, the loss comes first: see `eecompile.with_labels`. With `deadline_ms=`
        (milliseconds from now) or `budget=` (fraction of the full model's cost that no row may exceed) the best output
        until then: see `eecompile.anytime`.
        """
        if torch.compiler.is_compiling():
            return wrapping.untraced(self, args, kwargs if labels is None else {**kwargs, LABELS: labels})
        if labels is not None:
            if not takes_labels(self.program.signature):
                return with_loss(self, args, kwargs, labels)
            kwargs[LABELS] = labels
        allowance = anytime.taken(self, kwargs) if kwargs else None
        return self.answer(self.entry(args, kwargs), allowance)

    def answer(self, flat: Sequence[Tensor], allowance: Allowance | None = None) -> Any:
        """The output for flat inputs, in the model's own type."""
        outcome = self._execute(flat, self.live.current, False, allowance)
        output = self.program.restore(outcome.leaves, flat)
        anytime.close(self, outcome, allowance)
        return output

    def run(self, *args: Any, **kwargs: Any) -> Result:
        """The output with exit index, confidence and cost of every row.

        In train mode everything is computed, and `outputs`, `confidences` and `scores` of every exit are there too,
        differentiable. `deadline_ms=` and `budget=` as in a plain call.

        Raises:
            CaptureError: Other arguments than the model was captured with.
            StrategyError: A limit that is no number or cannot be kept.
        """
        allowance = anytime.taken(self, kwargs) if kwargs else None
        return self.measured(self.entry(args, kwargs), allowance)

    def measured(self, flat: Sequence[Tensor], allowance: Allowance | None = None) -> Result:
        """The result for flat inputs."""
        settings = self.live.current
        outcome = self._execute(flat, settings, True, allowance)
        result = self.result_of(outcome, settings, flat)
        if self.training and self.train_mode.gates == "every" and result.trace.route_weights is not None:
            result.trace.route_outputs = self._way_outputs(flat, settings)
        anytime.close(self, outcome, allowance, result)
        return result

    def observe(self, *args: Any, **kwargs: Any) -> Result:
        """Like `run`, but with every exit computed, in eval mode and without gradients.

        `gates` and `steps` are still those of `run`: a row that exited passes no later gate. `gate_scores` are there
        for every row; with exits closed first (`set_thresholds(2.0)`) every gate decides about every row.
        """
        with self._mode(False):
            return self.observe_at(self.settings, args, kwargs)

    def observe_at(self, settings: Settings, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Result:
        """`observe` under other settings than those of the module, which stay."""
        flat = self._flat_here(args, kwargs)
        with torch.no_grad(), self._mode(False):
            return self.result_of(self.engine.executor("reference").run(flat, settings, True), settings, flat)

    def full(self, *args: Any, **kwargs: Any) -> Any:
        """The output of the model as it was given, without any exit."""
        flat = self._flat_here(args, kwargs)
        graph = self.engine.full_graph() if self.origin.given is None else self.origin.given
        with torch.no_grad():
            return self.program.signature.restore(list(graph(*flat)), flat)

    def flatten(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """The tensors of a call in graph order; `CaptureError` where the graph does not take it, or is not the model."""
        return self.entry(args, kwargs)

    def _flat_here(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """The tensors of a call, which are where the program is; calls that are made often find that out when they fail."""
        flat = self.entry(args, kwargs)
        elsewhere = other_device(self.program.signature, flat, self.thresholds.device)
        if elsewhere is not None:
            raise elsewhere
        return flat

    def unchanged(self) -> None:
        """Asks for the user's model before the graph is written, measured or trained in its place.

        Raises:
            CaptureError: It has changed since it was compiled, and differs from the graph on the example.
        """
        if self.example is not None:
            self._call_or_example((), {})

    def _execute(
        self, flat: Sequence[Tensor], settings: Settings, want_confidence: bool, allowance: Allowance | None = None
    ) -> Outcome:
        try:
            if not self.training:
                return self.engine.chosen.run(flat, settings, want_confidence, allowance)
            executor = self.training_graphs.executor(self.train_mode, True)
            if self.train_mode.trunk and self.training_graphs.signature is not None:
                self.training_graphs.signature.check(flat)
            return executor.run(flat, settings)
        except RuntimeError as error:
            elsewhere = other_device(self.program.signature, flat, self.thresholds.device)
            if elsewhere is None:
                raise
            raise elsewhere from error

    def _way_outputs(self, flat: Sequence[Tensor], settings: Settings) -> tuple[Tensor, ...]:
        ways = range(len(self.settings[families.BRANCHES]))
        with torch.no_grad():
            outcomes = [self.training_graphs.executor(self.train_mode, True, way).run(flat, settings) for way in ways]
        return tuple(o.outputs[-1] for o in outcomes if o.outputs is not None)

    def result_of(self, outcome: Outcome, settings: Settings, flat: Sequence[Tensor]) -> Result:
        """The result for what an executor handed back."""
        mode = self.train_mode if self.training else None
        return results.result_of(self.cost_model, outcome, settings, flat, mode)

    def prediction_of(self, output: Any) -> Tensor:
        """The class scores within an output of the model's type."""
        assert self.program.prediction.index is not None
        return self.program.signature.flatten_output(output)[self.program.prediction.index]

    # ------------------------------------------------------------------ running under limits

    def stream(self, *args: Any, **kwargs: Any) -> Iterator[Result]:
        """Yields a `Result` after each open exit, each at least as far along as the one before.

        Every row has an output at once: `final` says which rows have exited, the others have that of the exit just
        passed. The last result is that of `fast.run(x)`. Nothing is computed before it is asked for, and nothing more
        once the loop is left. `deadline_ms=` counts from this call and includes the time that the consumer takes.

        Raises:
            StrategyError: In train mode; a limit that is no number or cannot be kept; or an executor that runs from input
                to output without the host ("device", "simulate"): `executor="compact"` streams.
            UnsupportedModelError: The model was captured as blocks.
        """
        anytime.needs_eval(self, "a stream")
        allowance = anytime.taken(self, kwargs) or Allowance()
        return anytime.stream(self, self._flat_here(args, kwargs), allowance)

    def interrupt(self) -> int:
        """Stops every call of this module that is running now, in whatever thread, after its next exit.

        Each returns the best output so far (`stopped="interrupt"`), at least the first exit's; a stream ends. Calls that
        start later are not touched. The reference executor computes everything, and what runs on a device by itself is out
        of the host's reach: neither can be stopped.

        Returns:
            How many calls are being stopped; 0 where none is running, which is no error.
        """
        return self.engine.interrupt()

    def within(self, *, deadline_ms: float | None = None, budget: float | None = None) -> anytime.Within:
        """This module under limits, for models that have an argument `deadline_ms` or `budget` of their own."""
        return anytime.Within(self, Limits(deadline_ms, budget))

    @property
    def stage_times(self) -> StageTimes:
        """What the present executor has measured of this machine; deadlines are kept by it."""
        return self.engine.chosen.times

    def measure_stages(self, *args: Any, rounds: int = 20, **kwargs: Any) -> StageTimes:
        """Times every stage on an example now, so that the first deadlines are kept as well as later ones.

        Executors of device programs ("device", "simulate") time stages only here, in every bucket, and before the first
        deadline of a program: calls leave no measurements there.

        Args:
            rounds: Passes over the example. No row exits early in them.
        """
        anytime.needs_eval(self, "a measurement")
        return anytime.measure_stages(self, self.entry(args, kwargs), rounds)

    # ------------------------------------------------------------------ settings

    @property
    def settings(self) -> Settings:
        """Thresholds, temperatures and all else that may be set, as one value."""
        return self.live.current

    @settings.setter
    def settings(self, new: Settings) -> None:
        check_kind("settings", new, Settings, "what fast.settings gives", StrategyError)
        self.live.replace(new)

    @property
    def thresholds(self) -> Tensor:
        """[E] float32; what is written to it counts from the next call on."""
        return self.graph_module.get_buffer(families.THRESHOLDS_BUFFER)

    @property
    def temperatures(self) -> Tensor:
        """[E + 1] float32, the model's own end last; as `thresholds`."""
        return self.graph_module.get_buffer(families.TEMPERATURES_BUFFER)

    @property
    def gate_thresholds(self) -> Tensor:
        """[G] float32; as `thresholds`."""
        found: Tensor = getattr(self.graph_module, families.GATES_BUFFER, self.thresholds.new_empty(0))
        return found

    @property
    def route_margins(self) -> Tensor:
        """[K] float32 of a router to branches; as `thresholds`. Empty without one."""
        found: Tensor = getattr(self.graph_module, families.BRANCHES_BUFFER, torch.empty(0))
        return found

    @property
    def halting_threshold(self) -> float:
        """What the halting scores of a row must add up to: 1 as trained, less stops sooner, above 1 never stops, as where
        nothing halts."""
        return records.halting_threshold(self.program, self.settings)

    def set_thresholds(self, thresholds: Any) -> None:
        """Sets when samples leave: one number for all exits, one for each in order, or by exit or gate name.

        No recompilation: only the set of open exits picks another plan. Calls that run meanwhile keep theirs.

        Raises:
            StrategyError: A wrong count, an unknown name, a negative number or NaN.
        """
        gates = self.settings.to_dict().get(families.GATES, {}).keys()
        if isinstance(thresholds, Mapping) and gates & set(thresholds):
            of_gates = {k: v for k, v in thresholds.items() if k in gates}
            of_exits = {k: v for k, v in thresholds.items() if k not in gates}
            self.live.set({families.EXITS: of_exits, families.GATES: of_gates})
        else:
            self.live.set({families.EXITS: thresholds})

    def set_temperatures(self, temperatures: Any) -> None:
        """Sets the softmax temperature of every exit and, last, of the model's own output.

        Raises:
            StrategyError: A wrong count, or a temperature that is not a positive number.
        """
        self.live.set({families.TEMPERATURES: temperatures})

    def set_gate_thresholds(self, thresholds: Any) -> None:
        """Sets from which score gates open: one number, one for each in order, or by gate name.

        0 keeps a gate open whatever its score, above 1 keeps it closed; both cost no score. No recompilation.

        Raises:
            StrategyError: A wrong count, an unknown name, a negative number or NaN.
        """
        self.live.set({families.GATES: thresholds})

    def set_halting_threshold(self, threshold: float) -> None:
        """Sets what scores must add up to: above 0; above 1 the model runs as it was.

        Raises:
            StrategyError: Not a positive number, or the program does not halt.
        """
        if families.HALTING not in self.settings:
            raise StrategyError("this program does not halt", hint="compile with a strategy that halts, such as act")
        self.live.set({families.HALTING: threshold})

    def set_route_margins(self, margins: Any) -> None:
        """Sets what each branch's probability is lowered by before the largest is taken: by name, or one for each.

        A number alone is for every route but the model's own. 0 compares them as they are, above 1 closes a route: then
        no row takes it, and where one alone is open the router itself is not run. No recompilation.

        Raises:
            StrategyError: No router to branches, a wrong count, an unknown name, a negative number, or all closed.
        """
        count = len(self.settings[families.BRANCHES])
        if not count:
            raise StrategyError(
                "this program has no router between branches",
                got="a router to exits" if self.routes else "no router",
                wanted='Branchy(router=Router(to={"light": 0.5}))',
                hint="exits that rows are sent to have thresholds: set_thresholds" if self.routes else None,
            )
        margins = plain(margins)
        if isinstance(margins, int | float) and not isinstance(margins, bool):
            margins = [float(margins)] * (count - 1) + [0.0]
        self.live.set({families.BRANCHES: margins})

    # ------------------------------------------------------------------ what was inserted

    @property
    def exits(self) -> tuple[records.ExitRecord, ...]:
        """The exits in order."""
        return records.exit_records(self.program, self.settings)

    @property
    def gates(self) -> tuple[records.GateRecord, ...]:
        """The gates in order."""
        return records.gate_records(self.program, self.settings)

    @property
    def widths(self) -> tuple[records.WidthRecord, ...]:
        """The parts that run at one of several widths."""
        return records.width_records(self.program)

    @property
    def halts(self) -> tuple[records.HaltRecord, ...]:
        """The chains of steps that rows halt in."""
        return records.halt_records(self.program, self.settings)

    @property
    def routes(self) -> tuple[records.RouteRecord, ...]:
        """The router's routes in order."""
        return records.route_records(self.program, self.settings, self.cost_model)

    @property
    def route_names(self) -> list[str]:
        """Names of the routes, the model's own last; none without a router."""
        return records.route_names(self.program)

    @property
    def untrained(self) -> tuple[str, ...]:
        """Names of exits, gates and routes, and "halting", that are not trained yet."""
        return self.live.untrained_names()

    @property
    def heads(self) -> nn.Module:
        """The inserted heads, by exit name."""
        found: nn.Module = getattr(self.graph_module, HEADS, nn.Module())
        return found

    def branch(self, exit_name: str) -> Branch:
        """The head of one exit, with its score where that is learned."""
        check_name("exit", exit_name, [e.name for e in self.program.exits], StrategyError)
        return records.branch_of(self.program, f"{HEADS}.{exit_name}")

    @property
    def combination(self) -> nn.Module:
        """The trained weights of the exits' ensemble: `weights` [E, E] and `bias` [E, C]; empty without."""
        found: nn.Module = getattr(self.graph_module, COMBINATION, nn.Module())
        return found

    @property
    def gate_units(self) -> nn.Module:
        """The inserted gate units, by name; one for all gates is called `policy`."""
        found: nn.Module = getattr(self.graph_module, GATES, nn.Module())
        return found

    @property
    def route_units(self) -> nn.Module:
        """The router's unit, called `unit`, and the branches: `branch_light` is the one called light."""
        found: nn.Module = getattr(self.graph_module, ROUTES, nn.Module())
        return found

    def head_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the inserted heads, gates, routers and branches that the model does not have itself."""
        own = {id(p) for p in self.trunk_parameters()}
        parts = (self.heads, self.combination, self.gate_units, self.route_units)
        found = {id(p): p for part in parts for p in part.parameters()}
        return (p for i, p in found.items() if i not in own)

    def trunk_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the user's model, or of the copy of it that is trained."""
        return self.program.source.parameters()

    # ------------------------------------------------------------------ costs

    def costs(self, open_exits: Sequence[bool], settings: Settings | None = None) -> Tensor:
        """[E + 1] float32: fraction of the full model's FLOPs of a row that leaves at each exit, open heads and the scores
        of gates included; every gate counts as open. Under the present settings, or those given."""
        asked: Any = open_exits
        given = plain(list(asked)) if isinstance(asked, Sequence) else None
        if given is None or len(given) != len(self.program.exits) or not all(isinstance(o, bool) for o in given):
            wanted = f"True or False for each of {len(self.program.exits)} exits"
            raise StrategyError("open_exits says of every exit if it is open", got=shown(asked)[:80], wanted=wanted)
        found = self.cost_model.at_exits(self.settings if settings is None else settings, open_exits)
        return torch.tensor(found, dtype=torch.float32)

    def route_costs(self) -> Tensor:
        """[K] float32: fraction of the full model's FLOPs of a row on each route, with the exits that are open now."""
        return self.cost_model.at_routes(self.settings)

    def confidences_of(
        self, outputs: Sequence[Tensor], temperatures: Tensor, scores: Sequence[Tensor] | None = None
    ) -> tuple[Tensor, ...]:
        """Confidences `[n]` of stored predictions with other temperatures, all exits open; NaN where none is known.

        Where the surest exit answers, `outputs` are those of the heads by themselves.
        """
        first = self.program.exits[0] if self.program.exits else None
        criterion = MaxProbability() if first is None else first.criterion
        surest = first is not None and first.combine == "confident"
        return confidences_of(criterion, surest, outputs, temperatures, scores)

    # ------------------------------------------------------------------ training and measuring

    def fit(self, loader: Iterable[Any], **options: Any) -> Any:
        """Trains what was inserted; see `eecompile.training.fit.fit`. The trunk stays frozen unless asked."""
        return fit(self, loader, **arguments("fit", fit, options))

    def calibrate(self, loader: Iterable[Any], *, budget: float | None = None, **options: Any) -> Any:
        """Sets temperatures and thresholds with a guarantee; see `eecompile.calibration.calibrate.calibrate`.

        With `budget=`, a mean fraction of the full model's cost, the most accurate thresholds that keep it instead; see
        `eecompile.calibration.budget.calibrate_budget`.
        """
        if budget is not None:
            _no_drop(options)
        with self._mode(False):
            if budget is None:
                report: Any = calibrate(self, loader, **options)
            else:
                report = calibrate_budget(self, loader, plain(budget), **options)
            self.live.calibrated(report.settings)
            self.guarantee = guarantee_of(self, report)
        return report

    def monitor(self, *, path: Any = None, loader: Any = None, compare: Any = None, **options: Any) -> Monitor:
        """Watches, without labels, whether the guarantee still holds; see `eecompile.calibration.monitor`."""
        asked = MonitorOptions(**arguments("monitor", MonitorOptions, options, CalibrationError))
        return Monitor(self, asked, path, loader, compare)

    def budget_curve(self, loader: Iterable[Any], test_loader: Iterable[Any] | None = None, **options: Any) -> Any:
        """Budget against accuracy; see `eecompile.calibration.budget.budget_curve`."""
        with self._mode(False):
            return budget_curve(self, loader, test_loader, **arguments("budget_curve", budget_curve, options))

    def evaluate(self, loader: Iterable[Any], **options: Any) -> Any:
        """Accuracy against compute; see `eecompile.training.evaluate.evaluate`."""
        with self.live.measuring():
            report = evaluate(self, loader, **arguments("evaluate", evaluate, options))
        report.guarantee = said(self)
        return report

    def benchmark(self, example: Any, **options: Any) -> Any:
        """Measured time against the original; see `eecompile.benchmark.benchmark`."""
        return benchmarks.benchmark(self, example, **arguments("benchmark", benchmarks.benchmark, options))

    def loss(self, result: Result, labels: Any) -> Tensor:
        """The strategy's objective on a result of `run` in train mode; with gates their price for `gate_mode` included.

        One objective for all calls: some keep means, and the price of a FLOP moves on.
        """
        check_kind("result", result, Result, "what fast.run gives in train mode")
        return loss_of(self, result, labels)

    @property
    def task(self) -> str | None:
        """What the model is for, one of `eecompile.training.tasks.TASKS`, as labels said or as it was set; None: unknown."""
        return self._task

    @task.setter
    def task(self, task: str | None) -> None:
        if task is not None:
            check_name("task", task, TASKS, StrategyError)
        self._task = task

    @property
    def train_trunk(self) -> bool:
        """Whether gradients reach the user's model in train mode."""
        return self.train_mode.trunk

    @train_trunk.setter
    def train_trunk(self, trunk: bool) -> None:
        self.train_mode = replace(self.train_mode, trunk=trunk)

    @property
    def gate_mode(self) -> str:
        """How gates and routers decide in train mode; see `eecompile.passes.training_decisions`."""
        return self.train_mode.gates

    @gate_mode.setter
    def gate_mode(self, mode: str) -> None:
        self.train_mode = replace(self.train_mode, gates=mode)

    def train(self, mode: bool = True) -> CompiledModule:
        """Train or eval mode. Untrained exits and gates are open in train mode; see `eecompile.runtime.live_settings`."""
        super().train(mode)
        self.live.follow(mode)
        return self

    def own_trunk(self, in_place: bool = False) -> None:
        """Training the trunk changes copies of the model's weights from now on, and the user's model stays as it is.

        `fit` calls it before it trains the trunk; call it before your own training loop does, before you make the
        optimizer. With `in_place` the user's model is trained itself.

        Raises:
            EecompileError: The model cannot be copied.
        """
        check_switches(CompiledModule.own_trunk, {"in_place": in_place})
        trunks.own_trunk(self, in_place)

    def capture_training(self) -> None:
        """Captures the model in train mode now, so that its trunk can be trained, after `load` too."""
        self.unchanged()
        with self._mode(True):
            self.training_graphs.capture()

    def follow_graphs(self) -> None:
        """Makes anew what was built from the program's graphs, which read other weights now."""
        self.entry = Entry(self.program, self.origin.running, self.origin.captured)
        self.training_graphs.reset()
        self.engine.rebuild()

    def replace_heads(self, heads: Mapping[str, tuple[str, nn.Module, float]]) -> None:
        """Other heads at exits: `{exit: (kind, head, FLOPs of head and decision for one row)}`.

        A head is an `eecompile.heads.Head` for the value at its exit, or the model's own final layers where these read
        nothing else. Thresholds stay as they are.
        """
        self.unchanged()
        check_kind("heads", heads, Mapping, "{exit: (kind, head, FLOPs)}")
        for name in heads:
            self.branch(name)  # an error where there is no such exit
        exits = []
        for e in self.program.exits:
            if e.name in heads:
                kind, head, flops = heads[e.name]
                branch = self.branch(e.name)
                branch.head, branch.takes_mask = head.train(branch.training), isinstance(head, Head)
                e = replace(e, head_kind=kind, head_flops=flops)
            exits.append(e)
        self.program = self.program.replace(exits=tuple(exits))
        for holder in (self.live, self.engine, self.training_graphs):
            holder.program = self.program
        self.cost_model = CostModel(self.program)
        self.training_graphs.clear()
        self.follow_graphs()

    @contextlib.contextmanager
    def prepare_training(self, trunk: bool) -> Iterator[None]:
        """Train mode with the trunk trainable or frozen; mode and flag are as before afterwards."""
        before, training = self.train_mode, self.training
        self.train_mode = replace(before, trunk=trunk)
        try:
            self.train()
            self.training_graphs.executor(self.train_mode, True)
            yield
        finally:
            self.train_mode = replace(self.train_mode, trunk=before.trunk)
            self.train(training)

    @contextlib.contextmanager
    def _mode(self, training: bool) -> Iterator[None]:
        try:
            with mode(self, training):
                yield
        finally:
            self.live.follow(self.training)

    # ------------------------------------------------------------------ executors

    @property
    def executor(self) -> str:
        """Name of the executor that runs in eval mode."""
        return self.engine.chosen.name

    @executor.setter
    def executor(self, name: str) -> None:
        self.engine.choose(name)

    @property
    def executor_reason(self) -> str:
        """Why that executor runs."""
        return self.engine.reason

    @property
    def backend(self) -> str:
        """ "eager", "inductor" or "onnxruntime": how the compact executor's segments run."""
        return self.engine.backend

    @backend.setter
    def backend(self, name: str) -> None:
        self.engine.set_backend(name)

    @property
    def device_options(self) -> Options:
        """How device programs are built: buckets, structure, how many are kept. Setting it drops those that are there."""
        return self.engine.options

    @device_options.setter
    def device_options(self, options: Options) -> None:
        check_kind("device_options", options, Options, "eecompile.runtime.device.executor.Options(...)", StrategyError)
        self.engine.options = options

    def device_program(self, *args: Any, **kwargs: Any) -> DeviceProgram:
        """What a call with these inputs is on a device that takes all decisions itself, as data: `print(it.describe())`."""
        return self.engine.device_program(self._call_or_example(args, kwargs), self.settings)

    def check_no_sync(self, *args: Any, **kwargs: Any) -> NoSync:
        """Looks for anything in the device program that would need the host between input and output. Needs no GPU.

        Args:
            args: A call, for its shapes; without one, the example that the model was compiled with.

        Returns:
            A report with `.ok` and `.problems`: node, reason and line of the model's code of each.

        Raises:
            UnsupportedModelError: The model was captured as blocks.
            CaptureError: A loaded program, which has no example, and no call was given.
        """
        return self.engine.check_no_sync(self._call_or_example(args, kwargs))

    def _call_or_example(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Sequence[Tensor]:
        """A call's flat inputs; those of the example for none."""
        if args or kwargs:
            return self._flat_here(args, kwargs)
        if self.example is None:
            raise CaptureError("a loaded program has no example inputs", hint="pass a call's arguments")
        flat = [t.to(self.thresholds.device) for t in self.example]
        self.entry.watch(flat)
        return flat

    # ------------------------------------------------------------------ graphs and reports

    @property
    def original(self) -> nn.Module | None:
        """The user's model, None for a loaded program."""
        return self.origin.model

    @property
    def running(self) -> nn.Module | None:
        """The model whose weights run: the user's, or its copy once the trunk has been trained."""
        return self.origin.running

    @property
    def given(self) -> fx.GraphModule | None:
        """Graph of the model as it was given, once the trunk has been trained."""
        return self.origin.given

    @property
    def example(self) -> tuple[Tensor, ...] | None:
        """Flat example inputs, None for a loaded program."""
        return self.origin.example

    @property
    def notes(self) -> tuple[str, ...]:
        """What is to be said about capture and training."""
        return tuple(self.origin.notes)

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
        if self.program.capture.models:
            return f"cascade of {', '.join(self.program.capture.models)}"
        return type(self.original).__name__ if self.original is not None else "loaded program"

    def __str__(self) -> str:
        return str(self.explain())

    def __repr__(self) -> str:
        count = len(self.program.exits)
        return f"CompiledModule({self.title}, {self.strategy.name}, {count} exits, executor={self.executor!r})"

    # ------------------------------------------------------------------ moving, saving and copying

    def _apply(self, fn: Any, recurse: bool = True) -> CompiledModule:
        wrapping.keeps_dtypes(self, fn)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.origin.given is not None:
            self.origin.given._apply(fn, recurse)  # type: ignore[no-untyped-call]
        wrapping.moved(self)
        return self

    def save(self, path: Any) -> None:
        """Writes a directory that `eecompile.load` reads; see `eecompile.artifact.write`."""
        write(self, path)

    def export(self, path: Any, target: str = "pt2") -> Path:
        """Writes a file that runs without Python, with the savings of its exits; see `eecompile.export`."""
        self.unchanged()
        return export(self.program, self.settings, path, target)

    def stage_inputs(self, loader: Iterable[Any]) -> dict[str, list[dict[str, Any]]]:
        """The rows that reach each stage of `export(..., target="stages")`; see `eecompile.export.stages`."""
        self.unchanged()
        return stage_inputs(self.program, self.settings, loader)

    def verify_export(self, path: Any, loader: Iterable[Any], **options: Any) -> ExportReport:
        """Runs what `export` wrote in its runtime and compares it with the reference; see `eecompile.export.verify`."""
        self.unchanged()
        options = arguments("verify_export", verify_export, options)
        return verify_export(self.program, self.settings, path, loader, **options)

    def report(self, path: Any, loader: Iterable[Any]) -> Path:
        """Writes one self-contained page about this module on labelled data; see `eecompile.report`."""
        return report(self, path, loader)

    def plot(self, kind: str, loader: Iterable[Any]) -> Any:
        """One plot of that page as a matplotlib figure: one of `eecompile.report.KINDS`."""
        return plot(self, kind, loader)

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledModule:
        return wrapping.deep_copy(self, memo)

    def __copy__(self) -> CompiledModule:
        return wrapping.shallow_copy(self)

    def _slow_forward(self, *args: Any, **kwargs: Any) -> Any:
        raise wrapping.traced("torch.jit.trace")

    def _replicate_for_data_parallel(self) -> Any:
        raise wrapping.no_replicas()


def _no_drop(options: Mapping[str, Any]) -> None:
    """Refuses a budget together with a drop.

    Raises:
        EecompileError: Both are asked for.
    """
    for name in ("max_drop", "delta"):
        if name in options:
            raise EecompileError(
                f"{name}= and budget= are two ways to calibrate",
                got="both",
                wanted="one of them",
                hint="a budget fixes the cost and gives the best accuracy; max_drop fixes the accuracy",
            )
