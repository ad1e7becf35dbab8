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
from eecompile.capture import Captured
from eecompile.capture import capture as capture_model
from eecompile.capture.adapter import no_autocast
from eecompile.capture.axes import BatchAxis
from eecompile.capture.cascade import capture_cascade, ready
from eecompile.capture.composite import compose, several
from eecompile.capture.export import capture_export
from eecompile.capture.order import order_matters
from eecompile.errors import CaptureError, EecompileError, MissingDependencyError, PassError, StrategyError
from eecompile.members import compiled_members
from eecompile.module import CompiledModule
from eecompile.options import CompileOptions
from eecompile.passes import analysis, insertion, run_passes
from eecompile.passes.carried import Brought, unwrapped
from eecompile.plain import check_callable, check_kind
from eecompile.prediction import find_prediction
from eecompile.program import Capture, Prediction, Program
from eecompile.runtime.origin import Origin
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
        backend: "eager", "inductor" for segments through `torch.compile` with a dynamic batch, or "onnxruntime" for segments
            in ONNX Runtime: CPU, float32, without gradients.
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
    chosen, args = resolve_strategy(strategy), _positional(example_inputs)
    kwargs = {} if example_kwargs is None else example_kwargs
    check_kind("example_kwargs", kwargs, Mapping, '{"x": x}, the keyword arguments of one call', CaptureError)
    check_callable("progress", progress, "(step's name) -> None")
    kwargs = dict(kwargs)
    if isinstance(chosen, SelfSpeculative):
        return cast(CompiledModule, _decoder(model, chosen, args, kwargs, blocks))
    options = CompileOptions(prediction, executor, backend, batch_axis, capture, dynamic, blocks, measure, seed)
    # Tracing and new heads draw numbers; the caller's generator stays put.
    with torch.random.fork_rng(devices=[]), no_autocast():
        return _compile(model, chosen, args, kwargs, options, progress or (lambda _: None))


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
    kwargs: dict[str, Any],
    options: CompileOptions,
    progress: Callable[[str], None],
) -> CompiledModule:
    progress("capture")
    subject = _captured(model, chosen, args, kwargs, options)
    captured, chosen, again = subject.captured, subject.strategy, subject.again
    program = Program(
        captured.graph_module,
        captured.graph_module,
        captured.signature,
        capture=Capture(captured.front_end, captured.models, subject.brought.places),
        prediction=Prediction(find_prediction(captured.signature.outputs, subject.prediction)),
    )
    program = run_passes(program, analysis(captured, options.measure, options.blocks), progress)
    program = run_passes(program, insertion(chosen.recipe(), captured, options.seed, subject.brought), progress)
    origin = Origin(
        model=subject.original,
        captured=subject.captured_from,
        example=captured.flat_example,
        exported=captured.exported,
        capture_training=None if again is None else partial(_train_capture, again),
        notes=captured.notes,
    )
    fast = CompiledModule(program, chosen, executor=options.executor, backend=options.backend, origin=origin)
    fast.live.hold_back()
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


def _train_capture(again: Callable[[nn.Module], Captured], program: Program, model: nn.Module | None) -> Captured:
    """The model of a program, captured in train mode.

    Raises:
        CaptureError: It gives other outputs there.
    """
    assert model is not None
    with no_autocast():
        train = again(model)
    same_outputs(program.signature, train.signature, model)
    return train


@dataclass(frozen=True)
class _Subject:
    """What is compiled, captured.

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


def _captured(
    model: Any, chosen: Strategy, args: tuple[Any, ...], kwargs: dict[str, Any], options: CompileOptions
) -> _Subject:
    models = several(model)
    chosen = chosen.over(1 if models is None else len(models))
    if models is None:
        return _one_model(model, chosen, args, kwargs, options)
    return _cascade(models, chosen, args, kwargs, options)


def _one_model(
    model: Any, chosen: Strategy, args: tuple[Any, ...], kwargs: dict[str, Any], options: CompileOptions
) -> _Subject:
    if not (options.prediction is None or isinstance(options.prediction, str | int)):
        raise StrategyError("a list of predictions is for a cascade", got=options.prediction, wanted="a name or an index")
    _check_model(model, bool(args or kwargs))
    axes: dict[str, Any] = {"batch_axis": options.batch_axis, "dynamic": options.dynamic}
    captured = capture_model(model, args, kwargs, front_end=options.capture, blocks=options.blocks, **axes)
    if not isinstance(model, nn.Module):
        return _Subject(captured, chosen, None, None, None, options.prediction)
    ordered = order_matters(model, captured.signature.parameters, args, kwargs)
    captured = replace(captured, signature=replace(captured.signature, ordered=ordered))
    again = partial(capture_export, args=args, kwargs=kwargs, **axes, training=True)
    return _Subject(captured, chosen, model, model, again, options.prediction)


def _cascade(
    models: Mapping[str, nn.Module],
    chosen: Strategy,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    options: CompileOptions,
) -> _Subject:
    _one_graph(models, args, kwargs, options)
    ways = [chosen.together.get(key) or (None,) * len(models) for key in ("prepare", "inputs")]
    notes: tuple[str, ...] = ()
    if chosen.within is not None:
        compile_one = partial(eecompile, strategy=chosen.within, batch_axis=options.batch_axis, seed=options.seed)
        models, notes = compiled_members(models, ways, args, kwargs, compile_one)
    models, brought = unwrapped(models, [p is None and i is None for p, i in zip(*ways, strict=True)])
    together = ready(
        compose(models, ways[0], ways[1], args, kwargs),
        args,
        kwargs,
        order=chosen.together.get("order", "check"),
        batch_axis=options.batch_axis,
        prediction=options.prediction,
        measure=options.measure,
    )
    axes: dict[str, Any] = {"batch_axis": options.batch_axis, "dynamic": options.dynamic}
    captured = capture_cascade(together, args, kwargs, **axes)
    captured = replace(captured, notes=(*captured.notes, *notes))
    again = partial(capture_cascade, args=args, kwargs=kwargs, **axes, training=True)
    return _Subject(captured, chosen, together.last.alone, together, again, together.leaf[together.order[-1]], brought)


def _one_graph(
    models: Mapping[str, nn.Module], args: Sequence[Any], kwargs: Mapping[str, Any], options: CompileOptions
) -> None:
    """What a cascade of several models needs, and cannot take."""
    if options.capture != "export" or options.blocks is not None:
        raise CaptureError(
            "several models are captured into one graph",
            got=f"capture={options.capture!r}, blocks={options.blocks!r}",
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
    check_kind("example_inputs", example_inputs, (tuple, list), "(x,), the positional arguments of one call", CaptureError)
    return tuple(example_inputs)


def _check_model(model: Any, example: bool) -> None:
    """Refuses what cannot be captured.

    Args:
        example: Whether there is an example input.

    Raises:
        CaptureError: With what to pass instead.
    """
    if isinstance(model, CompiledModule):
        raise CaptureError("this model is compiled already", hint="compile the original model")
    if not isinstance(model, nn.Module | ExportedProgram | str | Path):
        raise CaptureError(
            "eecompile() takes a module",
            got=f"{type(model).__name__}",
            wanted="torch.nn.Module, torch.export.ExportedProgram, or the path of a .pt2 file",
            hint="wrap a function in an nn.Module" if callable(model) else None,
        )
    if isinstance(model, nn.Module) and not example:
        raise CaptureError(
            "no example input",
            where=type(model).__name__,
            wanted="at least 2 rows",
            hint="pass example_inputs=(x,) or example_kwargs={...}",
        )


def load(path: str | Path, *, executor: str | None = None, device: str | torch.device | None = None) -> CompiledModule:
    """A saved program, ready to run; nothing but eecompile need be imported. A saved decoder gives a `CompiledDecoder`.

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
        if not isinstance(fast, CompiledModule):
            raise StrategyError("a decoder has no executor", where=str(path), got=f"executor={executor!r}")
        fast.executor = executor
    return fast


assert pickled is not None  # it registers how compiled modules are pickled

__all__ = ["EecompileError", "PassError", "eecompile", "find_prediction", "load"]
