"""The commands, as typer knows them: names, help and examples."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from eecompile.cli import build, demo, doctor, export, measure, monitor, serve, train
from eecompile.cli.out import guarded

# Up to 0.27.0 typer joins the lines of a paragraph of an epilog; later it keeps them, and paragraphs stand apart.
LINE = "\n" if tuple(int(n) for n in re.findall(r"\d+", typer.__version__)[:3]) > (0, 27, 0) else "\n\n"

app = typer.Typer(
    name="eecompile",
    help="Rewrite unmodified PyTorch models so that each input computes only as much as it needs.",
    epilog=LINE.join(
        [
            "Does it pay? eecompile advise net.py:net net.py:val",
            "A model from end to end:",
            "  eecompile rewrite net.py:net -o fast --data net.py:train --exits 3",
            "  eecompile fit fast --data net.py:train --epochs 5",
            "  eecompile calibrate fast --data net.py:val --max-drop 0.01",
            "  eecompile evaluate fast --data net.py:test",
            "No model at hand: eecompile demo",
        ]
    ),
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> None:
    if value:
        from eecompile import __version__

        typer.echo(f"eecompile {__version__}")
        raise typer.Exit


@app.callback()
def top(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="The version, and no more.")
    ] = False,
) -> None:
    """What comes before a command."""


def examples(*lines: str) -> str:
    """Examples for the end of a help page."""
    return LINE.join(["Examples:", *(f"  {line}" for line in lines)])


app.command(
    epilog=examples(
        "eecompile advise net.py:net net.py:val",
        "eecompile advise ./bert-dir val.csv --minutes 10 --static ./small-bert-dir",
        "eecompile advise net.py:net digits:val --only branchy --only int8 --json",
    )
)(guarded(measure.advise))
app.command(
    epilog=examples(
        "eecompile rewrite net.py:net -o fast --input x=float32[4,3,32,32] --exits 3",
        "eecompile rewrite ./bert-dir -o fast --strategy mebert --criterion patience",
        'eecompile rewrite net.py:make -o fast --data net.py:train --exits "layer*.1" --option threshold=0.8',
        "eecompile rewrite net.py:small net.py:large -o fast --strategy cascade --prepare net.py:shrink --prepare -",
    )
)(guarded(build.rewrite))
app.command(
    epilog=examples(
        "eecompile inspect fast",
        "eecompile inspect fast --format diff",
        "eecompile inspect net.py:net --input float32[4,3,32,32] --format table --after find_cuts",
        "eecompile inspect fast --format dot | dot -Tsvg -o fast.svg",
    )
)(guarded(build.inspect))
app.command(
    epilog=examples(
        "eecompile fit fast --data digits:train --val digits:val --epochs 10",
        "eecompile fit fast --data net.py:train --epochs 5 --checkpoint-dir ckpt -o fitted",
    )
)(guarded(train.fit))
app.command(
    epilog=examples(
        "eecompile calibrate fast --data digits:val --max-drop 0.01 --delta 0.05",
        "eecompile calibrate fast --data net.py:val --target agreement --no-guarantee",
        "eecompile calibrate fast --data digits:val --budget 0.5",
    )
)(guarded(train.calibrate))
app.command(
    epilog=examples(
        "eecompile evaluate fast --data digits:test",
        "eecompile evaluate fast --data net.py:test --curve 21 --json",
    )
)(guarded(measure.evaluate))
app.command(
    epilog=examples("eecompile report fast --data digits:test", "eecompile report fast --data net.py:test -o page.html")
)(guarded(measure.report))
app.command(
    epilog=examples(
        "eecompile run fast --data digits:test --rows 5",
        "eecompile run fast --input x=float32[2,1,8,8] --threshold 0.5",
        "eecompile run fast --data digits:test --threshold 1.0 --stream",
        "eecompile run fast --data digits:test --threshold 1.0 --deadline-ms 2",
    )
)(guarded(measure.run))
app.command(
    epilog=examples(
        "eecompile bench fast --data digits:test --batch 1",
        "eecompile bench fast --data net.py:test --batch 32 --model net.py:net --compile",
    )
)(guarded(measure.bench))
app.command(epilog=examples("eecompile serve fast", "eecompile serve fast --port 9000 --max-batch 64 --max-wait-ms 5"))(
    guarded(serve.serve)
)
app.command(
    epilog=examples(
        "eecompile export fast -o net.pt2",
        "eecompile export fast -o net.onnx --target onnx --verify digits:test",
        "eecompile export fast -o net.xml --target openvino --threshold 0.9 --json",
    )
)(guarded(export.export))
app.command(epilog=examples("eecompile monitor watch.json", "eecompile monitor watch.json --json"))(guarded(monitor.monitor))
app.command(epilog=examples("eecompile strategies", "eecompile strategies --json"))(guarded(build.strategies))
app.command(epilog=examples("eecompile doctor", "eecompile doctor --json"))(guarded(doctor.doctor))
app.command(epilog=examples("eecompile demo", "eecompile demo -o digits-fast --json"))(guarded(demo.demo))
