"""`eecompile(model, strategy=...)` and `load(path)`: the way in."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from eecompile.artifact import pickled
from eecompile.artifact.read import read
from eecompile.capture import Captured, capture
from eecompile.capture.adapter import no_autocast
from eecompile.capture.axes import BatchAxis
from eecompile.capture.cascade import capture_cascade, ready
from eecompile.capture.composite import several
from eecompile.capture.export import capture_export
from eecompile.errors import CaptureError, EecompileError, MissingDependencyError, PassError, StrategyError
from eecompile.members import compiled_members
from eecompile.module import CompiledModule
from eecompile.passes import analysis, insertion, prepare_training_graph, run_passes
from eecompile.passes.carried import Brought, unwrapped
from eecompile.plain import plain
from eecompile.prediction import find_prediction
from eecompile.program import Program
from eecompile.signature import Signature
from eecompile.strategies import SelfSpeculative, Strategy
from eecompile.strategies import strategy as resolve_strategy


def eecompile(
    model: nn.Module | ExportedProgram | str | Path | Sequence[nn.Module] | Mapping[str, nn.Module],
    strategy: str | Strategy = "branchy",
    *,
    example_inputs: Sequence[Any] | Tensor | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    prediction: str | int | Sequence[str | int | None] | None = None,
    executor: str = "auto",
    backend: str = "eager",
    batch_axis: BatchAxis = 0,
    capture: str = "export",
    dynamic: Mapping[str, Mapping[int, str]] | None = None,
    blocks: str | None = None,
    measure: bool = False,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> CompiledModule:
    """Rewrites an unmodified model so that each input computes only as much as it needs.

    Args:
        model: A module, a program of `torch.export`, or the path of a `.pt2` file. It is not changed: parameters are
            shared, hooks, mode and attributes stay. Several modules, as a list or by name, are a cascade.
        strategy: A name (`eecompile strategies` lists them) or an instance such as `strategies.Branchy(exits=3)`.
        example_inputs: Positional arguments of one call, with at least 2 different rows, better 4 or more.
        example_kwargs: Keyword arguments of that call; values that are no tensors are burned in.
        prediction: Which output holds the class scores, by name or index; found by itself where only one can.
            For a cascade also a list, one entry for each model.
        executor: "auto", "compact" (survivors only), "reference" (computes everything; the truth), "device" (one CUDA graph
            that takes all decisions itself; not verified on a GPU yet) or "simulate" (the device's program on any machine).
        backend: "eager", or "inductor" for stages through `torch.compile` with a dynamic batch.
        batch_axis: Axis of the batch in every tensor input, or by input name (None: that input has no batch).
        capture: "export" (one graph), or "blocks" for models that cannot be traced: exits at module boundaries.
        dynamic: Further free axes, `{"input_ids": {1: "seq"}}`; None finds the sequence axis of token inputs, `{}` has none.
        blocks: The repeated unit to take, as a module path with `*` (`"layer*.*"`), instead of the one found.
        measure: Place exits by time measured on the example instead of by FLOPs.
        seed: Seed of the new heads' weights.
        progress: Called with the name of each step.

    Returns:
        CompiledModule: Called like the model, and answering like it until something in it is trained or set: exits with
            untrained heads are closed, gates open, halting off. After training they have the strategy's thresholds. For
            `strategies.SelfSpeculative` an `eecompile.language.CompiledDecoder`, which generates.

    Raises:
        CaptureError: The model cannot be captured; the message names the line and the way round.
        UnsupportedModelError: Samples influence one another.
        StrategyError: Unknown strategy or place, an ambiguous prediction, or no place for an exit.
    """
    chosen = resolve_strategy(strategy)
    if isinstance(chosen, SelfSpeculative):
        return cast(CompiledModule, _decoder(model, chosen, _positional(example_inputs), dict(example_kwargs or {}), blocks))
    prediction, batch_axis, seed = plain(prediction), plain(batch_axis), plain(seed)
    # Tracing and new heads draw numbers; the caller's generator stays put.
    with torch.random.fork_rng(devices=[]), no_autocast():
        return _compile(
            model, chosen, _positional(example_inputs), example_kwargs, prediction, executor,
            backend, batch_axis, capture, dynamic, blocks, measure, seed, progress or (lambda _: None)
        )  # fmt: skip


def _decoder(
    model: Any, strategy: SelfSpeculative, args: tuple[Any, ...], kwargs: dict[str, Any], blocks: str | None
) -> Any:
    if importlib.util.find_spec("transformers") is None:
        raise MissingDependencyError("self_speculative needs transformers", hint="pip install 'eecompile[hf]'")
    from eecompile.language.decoder import compile_decoder

    return compile_decoder(model, strategy, args, kwargs, blocks)


def _compile(
    model: Any,
    chosen: Strategy,
    args: tuple[Any, ...],
    example_kwargs: Mapping[str, Any] | None,
    prediction: str | int | Sequence[str | int | None] | None,
    executor: str,
    backend: str,
    batch_axis: BatchAxis,
    front_end: str,
    dynamic: Mapping[str, Mapping[int, str]] | None,
    blocks: str | None,
    measure: bool,
    seed: int,
    tell: Callable[[str], None],
) -> CompiledModule:
    tell("capture")
    taken = _taken(
        model, chosen, args, dict(example_kwargs or {}), prediction, batch_axis, front_end, dynamic, blocks, measure, seed
    )
    captured, chosen, again = taken.captured, taken.strategy, taken.again
    program = Program(
        captured.graph_module,
        captured.graph_module,
        captured.signature,
        prediction=find_prediction(captured.signature.outputs, taken.prediction),
        models=captured.models,
        places=taken.brought.places,
        front_end=captured.front_end,
    )
    example = captured.flat_example
    program = run_passes(program, analysis(captured, measure, blocks), tell)
    recipe = chosen.recipe()
    program = run_passes(program, insertion(recipe, captured, seed, taken.brought), tell)

    fast = CompiledModule(
        program,
        chosen,
        executor=executor,
        backend=backend,
        original=taken.original,
        captured_from=taken.captured_from,
        example=example,
        training_program=None if again is None else partial(_training_program, again, recipe.equilibrium),
        artifact={"eval": captured.exported},
        notes=captured.notes,
    )
    fast.waiting.begin()
    return fast


def same_outputs(evaluated: Signature, trained: Signature, model: nn.Module | None) -> None:
    """Whether the model gives the same outputs in train mode.

    Raises:
        CaptureError: It gives others: auxiliary outputs, say.
    """
    if evaluated.out_spec != trained.out_spec or len(evaluated.outputs) != len(trained.outputs):
        raise CaptureError(
            "the model returns something else in train mode",
            where=None if model is None else type(model).__name__,
            got="; ".join(leaf.describe() for leaf in trained.outputs),
            wanted="; ".join(leaf.describe() for leaf in evaluated.outputs),
            hint="train the heads alone (trunk=False), or switch the auxiliary outputs off and train it by itself",
        )


def _training_program(again: Callable[[nn.Module], Captured], equilibrium: Any, fast: CompiledModule) -> Program:
    assert fast.captured_from is not None
    with no_autocast():
        train = again(fast.captured_from)
    same_outputs(fast.program.signature, train.signature, fast.original)
    fast.artifact["train"] = train.exported
    return prepare_training_graph(fast.program, train.graph_module, train.signature, equilibrium)


@dataclass(frozen=True)
class _Taken:
    """What the caller gave, captured.

    Attributes:
        original: The full model, called as the compiled module is; None for an exported program.
        captured_from: What was captured: that model, or all models of a cascade.
        again: Captures it, or a copy of it, in train mode.
        prediction: Which output of it holds the class scores, as far as is known.
        brought: Exits of compiled models among a cascade's.
    """

    captured: Captured
    strategy: Strategy
    original: nn.Module | None
    captured_from: nn.Module | None
    again: Callable[[nn.Module], Captured] | None
    prediction: str | int | None
    brought: Brought = field(default_factory=Brought)


def _taken(
    model: Any,
    chosen: Strategy,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    prediction: str | int | Sequence[str | int | None] | None,
    batch_axis: BatchAxis,
    front_end: str,
    dynamic: Mapping[str, Mapping[int, str]] | None,
    blocks: str | None,
    measure: bool,
    seed: int,
) -> _Taken:
    models = several(model)
    chosen = chosen.over(1 if models is None else len(models))
    axes: dict[str, Any] = {"batch_axis": batch_axis, "dynamic": dynamic}
    if models is None:
        if not (prediction is None or isinstance(prediction, str | int)):
            raise StrategyError("a list of predictions is for a cascade", got=prediction, wanted="a name or an index")
        captured = _captured(model, args, kwargs, front_end, batch_axis, dynamic, blocks)
        if not isinstance(model, nn.Module):
            return _Taken(captured, chosen, None, None, None, prediction)
        again = partial(capture_export, args=args, kwargs=kwargs, **axes, training=True)
        return _Taken(captured, chosen, model, model, again, prediction)
    _one_graph(models, args, kwargs, front_end, blocks)
    ways = [chosen.together.get(key) or (None,) * len(models) for key in ("prepare", "inputs")]
    notes: tuple[str, ...] = ()
    if chosen.within is not None:
        compile_one = partial(eecompile, strategy=chosen.within, batch_axis=batch_axis, seed=seed)
        models, notes = compiled_members(models, ways, args, kwargs, compile_one)
    models, brought = unwrapped(models, [p is None and i is None for p, i in zip(*ways, strict=True)])
    together = ready(models, args, kwargs, batch_axis=batch_axis, prediction=prediction, measure=measure, **chosen.together)
    captured = capture_cascade(together, args, kwargs, **axes)
    captured = replace(captured, notes=(*captured.notes, *notes))
    again = partial(capture_cascade, args=args, kwargs=kwargs, **axes, training=True)
    return _Taken(captured, chosen, together.last.alone, together, again, together.leaf[together.order[-1]], brought)


def _one_graph(
    models: Mapping[str, nn.Module], args: Sequence[Any], kwargs: Mapping[str, Any], front_end: str, blocks: str | None
) -> None:
    """What a cascade of several models needs, and cannot take."""
    if front_end != "export" or blocks is not None:
        raise CaptureError(
            "several models are captured into one graph",
            got=f"capture={front_end!r}, blocks={blocks!r}",
            wanted='capture="export", without blocks=',
        )
    if not args and not kwargs:
        raise CaptureError(
            "no example input",
            where=", ".join(models),
            wanted="at least 2 rows",
            hint="pass example_inputs=(x,) or example_kwargs={...}",
        )


def _positional(example_inputs: Sequence[Any] | Tensor | None) -> tuple[Any, ...]:
    if example_inputs is None:
        return ()
    if isinstance(example_inputs, Tensor):  # a common slip: example_inputs=x for example_inputs=(x,)
        return (example_inputs,)
    if isinstance(example_inputs, Mapping):
        raise CaptureError("example_inputs= takes a tuple", got="a dict", hint="pass it as example_kwargs=")
    return tuple(example_inputs)


def _captured(
    model: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None,
    front_end: str,
    batch_axis: BatchAxis,
    dynamic: Mapping[str, Mapping[int, str]] | None,
    blocks: str | None,
) -> Captured:
    if isinstance(model, CompiledModule):
        raise CaptureError("this model is compiled already", hint="compile the original model")
    if not isinstance(model, nn.Module | ExportedProgram | str | Path):
        raise CaptureError(
            "eecompile() takes a module",
            got=f"{type(model).__name__}",
            wanted="torch.nn.Module, torch.export.ExportedProgram, or the path of a .pt2 file",
            hint="wrap a function in an nn.Module" if callable(model) else None,
        )
    if isinstance(model, nn.Module) and not args and not kwargs:
        raise CaptureError(
            "no example input",
            where=type(model).__name__,
            wanted="at least 2 rows",
            hint="pass example_inputs=(x,) or example_kwargs={...}",
        )
    return capture(
        model, args, dict(kwargs or {}), front_end=front_end, batch_axis=batch_axis, dynamic=dynamic, blocks=blocks
    )


def load(path: str | Path, *, executor: str | None = None, device: str | torch.device | None = None) -> CompiledModule:
    """A saved program, ready to run; nothing but eecompile need be imported.

    Args:
        executor: Instead of the saved one.
        device: Where to put it; the CPU by default.

    Raises:
        ArtifactError: Missing, truncated, altered or foreign files; the message names the file.
        MissingDependencyError: The output class is one of transformers, which is not installed.
    """
    fast = read(path)
    if device is not None:
        fast.to(device)
    if executor is not None:
        fast.executor = executor
    return fast


assert pickled is not None  # it registers how compiled modules are pickled

__all__ = ["EecompileError", "PassError", "eecompile", "find_prediction", "load"]
