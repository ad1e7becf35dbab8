"""`advise`, `evaluate`, `report`, `run` and `bench`: what a model would do, and what a saved program does."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from eecompile.cli import names
from eecompile.cli import options as o
from eecompile.cli.out import reporting
from eecompile.cli.train import BatchSize

Threads = Annotated[int | None, typer.Option(help="Threads of torch.", show_default="torch's own choice")]


@o.grouped
def advise(
    model: o.Model,
    *,
    data: Annotated[str, typer.Argument(metavar="DATA", help=o.DATA_HELP, autocompletion=names.completing(names.DATA))],
    minutes: Annotated[float, typer.Option(help="Budget of time; what is cut short is said.")] = 5.0,
    static: Annotated[str | None, typer.Option(metavar="MODEL", help="A smaller model to compare with.")] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Try this alone, repeatable: {', '.join(names.ADVISED)}.",
            autocompletion=names.completing(names.ADVISED),
            show_default="everything that works here",
        ),
    ] = None,
    prediction: o.Prediction = None,
    batch_size: BatchSize = None,
    texts: o.TextOptions,
    seed: o.Seed = 0,
    as_json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Say whether early exit would pay for a model, before anything is trained, and what to do.

    Use data that the model was not trained on. Nothing is saved.
    """
    with reporting(as_json) as out:
        from dataclasses import replace

        from eecompile.advice import advise as advice
        from eecompile.cli import data as datas
        from eecompile.cli import models
        from eecompile.cli.text import Texts

        read = Texts.of_model(texts, model, out.say)
        subject: Any = models.find(model).model
        smaller: Any = None if static is None else models.find(static).model
        found = advice(
            subject,
            datas.loader(data, batch_size, read, shuffle=True),
            minutes=minutes,
            static=smaller,
            only=only,
            prediction=o.output(prediction),
            seed=seed,
            progress=out.say,
        )
        found = replace(found, model=model, data=data)
        out.show(found)
        out.todo(found.commands, found.python)
        out.result(found.to_dict())


@o.grouped
def evaluate(
    directory: o.Saved,
    *,
    data: o.Data,
    curve: Annotated[
        int | None, typer.Option(help="Also this many points of the trade-off of one threshold for all exits.")
    ] = None,
    budgets: Annotated[
        bool, typer.Option("--budgets", help="Also the accuracy if no row may cost more than each open exit does.")
    ] = False,
    threshold: o.Threshold = None,
    batch_size: BatchSize = None,
    texts: o.TextOptions,
    as_json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Accuracy and cost of every exit and of the whole, against the full model."""
    with reporting(as_json) as out:
        from eecompile.cli import data as datas
        from eecompile.cli import models
        from eecompile.cli.text import Texts

        fast = models.saved(directory, threshold)
        out.state(fast)
        read = Texts.of_saved(texts, fast, directory, out.say)
        loader = datas.loader(data, batch_size, read)
        report = fast.evaluate(loader, curve=False if curve is None else curve, budgets=budgets)
        out.show(report)
        out.result(report.to_dict())


@o.grouped
def report(
    directory: o.Saved,
    *,
    data: o.Data,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The page to write.")] = Path("report.html"),
    threshold: o.Threshold = None,
    batch_size: BatchSize = None,
    texts: o.TextOptions,
    as_json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """One page: accuracy against cost, where rows exit, latency, reliability, the graph, examples.

    Needs matplotlib and jinja2: pip install 'eecompile[report]'.
    """
    with reporting(as_json) as out:
        from eecompile.cli import data as datas
        from eecompile.cli import models
        from eecompile.cli.text import Texts

        fast = models.saved(directory, threshold)
        out.state(fast)
        read = Texts.of_saved(texts, fast, directory, out.say)
        written = fast.report(output, datas.loader(data, batch_size, read))
        out.after(written)
        out.result({"report": str(written)})


@o.grouped
def run(
    directory: o.Saved,
    *,
    example: o.ExampleInput,
    rows: Annotated[int, typer.Option(help="Rows to take from --data.")] = 8,
    threshold: o.Threshold = None,
    deadline_ms: Annotated[
        float | None, typer.Option(help="Milliseconds for the call; stages are timed on this input first.")
    ] = None,
    budget: Annotated[float | None, typer.Option(help="Most that a row may cost, as a fraction of the full cost.")] = None,
    stream: Annotated[bool, typer.Option("--stream", help="The output after each exit, as it gets better.")] = False,
    executor: o.Executor = "auto",
    texts: o.TextOptions,
    seed: o.Seed = 0,
    as_json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Run some inputs and say where each row left and why; or what it had by a deadline, for a budget, at each exit."""
    with reporting(as_json) as out:
        import torch

        from eecompile.cli import inputs, models
        from eecompile.cli.steps import steps
        from eecompile.cli.text import Texts
        from eecompile.inspect import where

        if rows < 1:
            raise _none("rows", rows)
        fast = models.saved(directory, threshold)
        out.state(fast)
        read = Texts.of_saved(texts, fast, directory, out.say)
        fast.executor = executor
        args, kwargs = _call(inputs.example(example, rows, seed, read), fast)
        if stream or deadline_ms is not None or budget is not None:
            with torch.no_grad():
                found = steps(fast, args, kwargs, deadline_ms, budget, stream)
            out.show(found)
            out.result({"executor": fast.executor, **found.to_dict()})
            return
        with torch.no_grad():
            result = fast.run(*args, **kwargs)
            departures = where(fast, *args, **kwargs)
        out.show(departures, *(f"row {r.row}: {r.why}" for r in departures.rows[:3]))
        out.result(
            {
                "executor": fast.executor,
                "exit_index": result.exit_index.tolist(),
                "confidence": [float(c) for c in result.confidence.tolist()],
                "cost": [float(c) for c in result.cost.tolist()],
                **departures.to_dict(),
            }
        )


@o.grouped
def bench(
    directory: o.Saved,
    *,
    example: o.ExampleInput,
    batch: Annotated[int, typer.Option(help="Rows to take from --data.")] = 32,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds; the median counts.")] = 9,
    model: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="The original model to compare with.", show_default="its captured graph"),
    ] = None,
    compile: Annotated[bool, typer.Option("--compile", help="Also the original under torch.compile.")] = False,
    threshold: o.Threshold = None,
    executor: o.Executor = "auto",
    backend: Annotated[
        str | None, typer.Option(help="eager, inductor or onnxruntime.", show_default="the saved one")
    ] = None,
    threads: Threads = None,
    texts: o.TextOptions,
    seed: o.Seed = 0,
    as_json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Measured time against the original, in one run, in turns."""
    with reporting(as_json) as out:
        from eecompile.cli import inputs, models
        from eecompile.cli.text import Texts

        if batch < 1:
            raise _none("batch", batch)
        models.threads(threads)
        fast = models.saved(directory, threshold)
        out.state(fast)
        read = Texts.of_saved(texts, fast, directory, out.say)
        if backend is not None:
            fast.backend = backend
        fast.executor = executor
        args, kwargs = _call(inputs.example(example, batch, seed, read), fast)
        original: Any = None if model is None else models.find(model).model
        report = fast.benchmark(kwargs if kwargs else args, rounds=rounds, compile_original=compile, original=original)
        against = "its Python model" if model is not None else "its captured graph"
        out.show(report, f"original: {against}")
        out.result({**report.to_dict(), "original": against})


def _call(call: Any, fast: Any) -> Any:
    """The call, or an error that lists what the program takes."""
    from eecompile.errors import EecompileError

    if call is None:
        raise EecompileError(
            "no input was given",
            wanted="; ".join(leaf.describe() for leaf in fast.program.signature.inputs),
            hint="pass --data digits:test, --input name=float32[4,3,32,32], or --example file.py:attr",
        )
    return call


def _none(what: str, got: int) -> Exception:
    from eecompile.errors import EecompileError

    return EecompileError(f"--{what} is a number of at least 1", got=got)
