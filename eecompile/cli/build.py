"""`rewrite`, `inspect` and `strategies`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from eecompile.cli import names
from eecompile.cli import options as o
from eecompile.cli.out import reporting


@o.grouped
def rewrite(
    model: o.Models,
    *,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Where to save the program.")],
    built: o.StrategyOptions,
    prediction: o.Prediction = None,
    executor: o.Executor = "auto",
    backend: o.Backend = "eager",
    blocks: o.Blocks = None,
    batch_axis: o.BatchAxis = 0,
    measure: o.Measure = False,
    example: o.ExampleInput,
    texts: o.TextOptions,
    seed: o.Seed = 0,
    as_json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Capture a model, insert exits, and save the result as a directory.

    The model is not trained or changed; `fit` and `calibrate` come next. Several models make a cascade: their own
    predictions are the exits, and only rows that are not sure yet reach the next.
    """
    with reporting(as_json) as out:
        from eecompile.artifact.files import free_place
        from eecompile.cli import inputs, models
        from eecompile.cli.text import Texts, keep
        from eecompile.options import CompileOptions

        free_place(output)
        options = CompileOptions(
            o.output(prediction), executor, backend, batch_axis, blocks=blocks, measure=measure, seed=seed
        )
        read = Texts.of_model(texts, model[-1], out.say)
        call = inputs.example(example, seed=seed, texts=read)
        fast = models.compiled(model, built, options, call, out.say)
        out.say("save")
        fast.save(output)
        keep(Path(model[-1]), output, out.say)
        out.show(_places(fast))
        out.after(output, f"eecompile fit {output} --data ...")
        out.result({"saved": str(output), **fast.explain().to_dict()})


def _places(fast: Any) -> Any:
    """What was inserted, what was refused, and how long it took."""
    from rich.console import Group
    from rich.text import Text

    from eecompile.inspect.decisions import sections
    from eecompile.inspect.tables import decisions, exits

    refused = len(fast.program.refusals)
    seconds = sum(s.seconds for s in fast.history)
    count = ", ".join([f"{len(fast.exits)} exits", *(section.count for section in sections(fast))])
    total = f"{count}; {refused} places refused (eecompile inspect says why); passes took {seconds:.2f} s"
    return Group(*([exits(fast)] if fast.exits else []), *decisions(fast), Text(total))


@o.grouped
def inspect(
    model: o.Models,
    *,
    format: Annotated[
        str,
        typer.Option("--format", "-f", help=f"{', '.join(names.FORMATS)}.", autocompletion=names.completing(names.FORMATS)),
    ] = "tree",
    after: Annotated[
        str | None,
        typer.Option(
            help="The graph after this pass, or source, marked or staged.",
            autocompletion=names.completing(names.LEVELS),
            show_default="the program as it runs",
        ),
    ] = None,
    speculation: Annotated[
        bool,
        typer.Option(
            "--speculation",
            help="Of a causal language model and texts (--data): what drafting at each exit would gain, on this machine.",
        ),
    ] = False,
    built: o.StrategyOptions,
    prediction: o.Prediction = None,
    capture: o.Capture = "export",
    blocks: o.Blocks = None,
    batch_axis: o.BatchAxis = 0,
    measure: o.Measure = False,
    example: o.ExampleInput,
    texts: o.TextOptions,
    seed: o.Seed = 0,
    as_json: Annotated[bool, typer.Option("--json", help="The same as --format json.", rich_help_panel=o.COMMON)] = False,
    debug: o.Debug = False,
) -> None:
    """Show what was found in a model, what was inserted, what was refused, and why.

    A saved directory is shown as it is; any other model is rewritten first, and nothing is saved.
    """
    as_json = as_json or format == "json"
    with reporting(as_json) as out:
        from eecompile import inspect as show
        from eecompile.cli import data as datas
        from eecompile.cli import inputs, models
        from eecompile.cli.text import Texts
        from eecompile.errors import EecompileError, near
        from eecompile.options import CompileOptions

        if format not in show.FORMATS:
            raise EecompileError("unknown format", got=repr(format), wanted=near(format, show.FORMATS))
        options = CompileOptions(
            o.output(prediction), batch_axis=batch_axis, capture=capture, blocks=blocks, measure=measure, seed=seed
        )
        read = Texts.of_model(texts, model[-1], out.say)
        if speculation:
            if example.data is None or len(model) > 1:
                raise EecompileError("--speculation takes one model, and --data with texts or batches of token ids")
            loader = datas.loader(example.data, 1, read, labels=False)  # a row at a time: no padding
            report = models.decoder(model[0], built, loader, blocks).speculation(loader)
            out.show(report)
            out.result(report.to_dict())
            return
        call = inputs.example(example, seed=seed, texts=read)
        fast = models.compiled(model, built, options, call, out.say)
        if as_json:
            out.result(show.to_dict(fast, after))
        else:
            out.show(show.render(fast, format, after))


def strategies(as_json: o.Json = False, debug: o.Debug = False) -> None:
    """List the strategies: what each inserts, where it is from, and its defaults."""
    with reporting(as_json) as out:
        from rich.table import Table

        from eecompile.strategies import STRATEGIES

        described = [
            {"name": name, "summary": kind.summary, "paper": kind.paper, "defaults": kind().to_dict()}
            for name, kind in STRATEGIES.items()
        ]
        table = Table(title="strategies", title_justify="left", show_lines=True)
        for column in ("name", "inserts", "from", "defaults"):
            table.add_column(column, overflow="fold")
        for name, kind in STRATEGIES.items():
            defaults = dict(kind().to_dict())
            defaults.pop("name")
            table.add_row(name, kind.summary, kind.paper, "\n".join(f"{k}={_short(v)}" for k, v in defaults.items()))
        out.show(table, "set one with --option key=value, or strategies.Branchy(key=value) in Python")
        out.result({"strategies": described})


def _short(value: Any) -> str:
    return str(value["name"]) if isinstance(value, dict) and "name" in value else str(value)
