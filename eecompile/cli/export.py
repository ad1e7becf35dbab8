"""`export`: a saved program as a file for another runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from eecompile.cli import names
from eecompile.cli import options as o
from eecompile.cli.out import reporting
from eecompile.cli.train import BatchSize


def export(
    directory: o.Saved,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="PATH", help="The file to write.")],
    target: Annotated[
        str, typer.Option(help=f"{', '.join(names.RUNTIMES)}.", autocompletion=names.completing(names.RUNTIMES))
    ] = "pt2",
    verify: Annotated[
        str | None, typer.Option(metavar="DATA", help="Run the file in its runtime on this data and compare each row.")
    ] = None,
    threshold: o.Threshold = None,
    batch_size: BatchSize = None,
    as_json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Write a program that runs without Python, with the savings of its exits at every batch size.

    Closed exits are left out; thresholds of the others can be set in the file, without another export. With --verify the
    command ends with 2 where the file does not do what the program does.
    """
    with reporting(as_json) as out:
        from eecompile.cli import data as datas
        from eecompile.cli import models
        from eecompile.cli.text import Texts
        from eecompile.errors import ExportError
        from eecompile.export.runtimes import opened

        fast = models.saved(directory, threshold)
        out.state(fast)
        out.say(f"export for {target}")
        path = fast.export(output, target=target)
        said = {"exported": str(path), "bytes": _bytes(path), **vars(opened(path).description)}
        if verify is None:
            out.after(path)
            out.result(said)
            return
        texts = Texts.of_saved(o.TextOptions(), fast, directory, out.say)
        report = fast.verify_export(path, datas.loader(verify, batch_size, texts, labels=False))
        out.show(report)
        out.after(path)
        out.result({**said, "verified": report.to_dict()})
        if not report.ok:
            raise ExportError("the exported program does not do what the program does", got="; ".join(report.problems))


def _bytes(path: Path) -> int:
    """With the files next to it that hold its weights."""
    weights = (path.with_suffix(".bin"), path.with_name(f"{path.name}.data"))
    files = path.rglob("*") if path.is_dir() else (path, *weights)
    return sum(p.stat().st_size for p in files if p.is_file())
