"""`fit` and `calibrate`: they read a saved program and write it back."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from eecompile.cli import names
from eecompile.cli import options as o
from eecompile.cli.out import reporting

BatchSize = Annotated[int | None, typer.Option(help="Of built-in data; a loader of your own has its own.")]


@o.grouped
def fit(
    directory: o.Saved,
    *,
    data: o.Data,
    val: Annotated[str | None, typer.Option(help="Data to measure on after every epoch.")] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the data.")] = 1,
    lr: Annotated[float, typer.Option(help="Learning rate of the heads.")] = 1e-3,
    trunk: Annotated[
        bool | None,
        typer.Option("--trunk/--heads-only", help="Train the model itself too.", show_default="the strategy's"),
    ] = None,
    trunk_lr: Annotated[float | None, typer.Option(help="Learning rate of the model.", show_default="lr / 10")] = None,
    objective: Annotated[
        str | None, typer.Option(help="Name of the training objective.", show_default="the strategy's")
    ] = None,
    scheduler: Annotated[str | None, typer.Option(help="cosine, or none.")] = None,
    patience: Annotated[
        int | None, typer.Option(help="Stop after this many epochs that are no better; needs --val.")
    ] = None,
    batch_size: BatchSize = None,
    checkpoint_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Where checkpoints go and stay; a stopped run goes on from there.",
            show_default="next to the program, removed when training is done",
        ),
    ] = None,
    checkpoint_every: Annotated[int | None, typer.Option(help="Steps between checkpoints.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on from a checkpoint if there is one.")] = True,
    texts: o.TextOptions,
    output: o.Output = None,
    seed: o.Seed = 0,
    as_json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Train the exits of a saved program; the model itself stays as it is unless asked.

    The directory is replaced in one step, once training is done.
    """
    with reporting(as_json) as out:
        from eecompile.artifact import files
        from eecompile.cli import data as datas
        from eecompile.cli import models
        from eecompile.cli.text import Texts, keep

        place = files.free_place(output or directory)
        fast = models.saved(directory)
        read = Texts.of_saved(texts, fast, directory, out.say)
        options: dict[str, object] = {"trunk": trunk} if trunk is not None else {}
        # named after the program's content: what is left of a run on another program is never taken up
        digest = files.sha256(directory / files.MANIFEST)[:8]
        checkpoints = checkpoint_dir or place.resolve().with_name(f"{place.resolve().name}.fit-{digest}")
        try:
            report = fast.fit(
                datas.loader(data, batch_size, read, shuffle=True),
                epochs=epochs,
                lr=lr,
                trunk_lr=trunk_lr,
                objective=objective,
                scheduler=scheduler,
                patience=patience,
                val_loader=None if val is None else datas.loader(val, batch_size, read),
                checkpoint_dir=checkpoints,
                checkpoint_every=checkpoint_every,
                resume=resume,
                seed=seed,
                **options,
            )
        except KeyboardInterrupt:
            out.say("the same command goes on from there; --no-resume starts anew")
            raise
        fast.save(place)
        keep(directory, place, out.say)
        if checkpoint_dir is None:
            shutil.rmtree(checkpoints, ignore_errors=True)
        out.show(report)
        out.after(place, f"eecompile calibrate {place} --data ...")
        out.result({"saved": str(place), **report.to_dict()})


@o.grouped
def calibrate(
    directory: o.Saved,
    *,
    data: o.Data,
    max_drop: Annotated[
        float | None, typer.Option(help="Largest drop: 0.01 is one percent point of accuracy.", show_default="0.01")
    ] = None,
    delta: Annotated[
        float | None, typer.Option(help="Largest probability that the drop is larger after all.", show_default="0.05")
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(help="Instead of a drop: the most accurate thresholds at this mean fraction of the full cost."),
    ] = None,
    guarantee: Annotated[
        bool, typer.Option(help="Without one: the cheapest thresholds whose drop on this data is small enough.")
    ] = True,
    target: Annotated[
        str,
        typer.Option(
            help="accuracy against the labels, or agreement with the full model (needs no labels).",
            autocompletion=names.completing(names.TARGETS),
        ),
    ] = "accuracy",
    temperature: Annotated[bool, typer.Option(help="Fit a temperature for each exit.")] = True,
    conditional: Annotated[
        bool, typer.Option("--conditional", help="Keep the bound among the rows that exit at or before each exit too.")
    ] = False,
    groups: Annotated[
        str | None,
        typer.Option(help="Report the drop of each group: classes, or file.py:attr with a label for each row."),
    ] = None,
    control_groups: Annotated[bool, typer.Option("--control-groups", help="Keep the bound in each group too.")] = False,
    static: Annotated[
        str | None, typer.Option(metavar="SPEC", help="A smaller model to compare with: file.py:attr, a pair (model, cost).")
    ] = None,
    batch_size: BatchSize = None,
    texts: o.TextOptions,
    output: o.Output = None,
    seed: o.Seed = 0,
    as_json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Choose thresholds that lose at most --max-drop, or the best for a --budget, and save them with the program.

    Use data that training has not seen. Where no thresholds qualify, exits are closed, gates open, no row halts (or a
    setting that is clearly better is kept), and it says so.
    """
    with reporting(as_json) as out:
        from eecompile.artifact import files
        from eecompile.cli import data as datas
        from eecompile.cli import models, sources
        from eecompile.cli.text import Texts, keep
        from eecompile.errors import EecompileError

        if budget is not None and (max_drop is not None or delta is not None or not guarantee):
            raise EecompileError(
                "a budget fixes the cost, a drop the accuracy",
                got="--budget with --max-drop, --delta or --no-guarantee",
                wanted="one of the two",
            )
        place = files.free_place(output or directory)
        fast = models.saved(directory)
        read = Texts.of_saved(texts, fast, directory, out.say)
        how: dict[str, Any] = {"budget": budget}
        if budget is None:
            bound = 0.05 if delta is None else delta
            how = {
                "max_drop": 0.01 if max_drop is None else max_drop,
                "delta": bound if guarantee else None,
                "conditional": conditional,
                "groups": groups if groups in (None, "classes") else sources.attribute(groups, "labels of groups"),
                "control_groups": control_groups,
                "static": None if static is None else sources.attribute(static, "a model and its cost"),
            }
        elif conditional or groups or control_groups or static:
            raise EecompileError(
                "a budget promises nothing that could be kept in parts of the rows",
                got="--budget with --conditional, --groups, --control-groups or --static",
                wanted="--max-drop with these",
            )
        report = fast.calibrate(
            datas.loader(data, batch_size, read, labels=target == "accuracy"),
            **how,
            target=target,
            temperature=temperature,
            seed=seed,
        )
        fast.save(place)
        keep(directory, place, out.say)
        out.show(report)
        out.after(place, f"eecompile evaluate {place} --data ...")
        out.result({"saved": str(place), **report.to_dict()})
