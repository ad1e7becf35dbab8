"""Arguments and options that several commands take."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from eecompile.cli import names

HOW_BUILT = "How to rewrite"
INPUT = "Example input"
COMMON = "Common"

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="package.module:attr or file.py:attr (a module, or a function or class that gives one), a local "
        "Hugging Face directory, a .pt2 file, or a saved directory.",
    ),
]
Models = Annotated[
    list[str],
    typer.Argument(
        metavar="MODEL...",
        help="package.module:attr or file.py:attr (a module, or a function or class that gives one), a local "
        "Hugging Face directory, a .pt2 file, or a saved directory. Several, the cheapest first, are a cascade.",
    ),
]
Saved = Annotated[Path, typer.Argument(metavar="DIR", help="A directory written by `eecompile rewrite`.")]

Prediction = Annotated[
    str | None,
    typer.Option(help="The output with the class scores, by name or index.", rich_help_panel=HOW_BUILT),
]
Executor = Annotated[
    str,
    typer.Option(
        help=f"{', '.join(names.EXECUTORS)}.",
        autocompletion=names.completing(names.EXECUTORS),
        rich_help_panel=HOW_BUILT,
    ),
]
Backend = Annotated[
    str,
    typer.Option(
        help=f"{', '.join(names.BACKENDS)}.",
        autocompletion=names.completing(names.BACKENDS),
        rich_help_panel=HOW_BUILT,
    ),
]
Capture = Annotated[
    str,
    typer.Option(
        help="export: one graph; blocks: exits at module boundaries, for models that cannot be traced.",
        autocompletion=names.completing(names.CAPTURES),
        rich_help_panel=HOW_BUILT,
    ),
]
Blocks = Annotated[
    str | None,
    typer.Option(help='The repeated unit to take, such as "layer*.*".', rich_help_panel=HOW_BUILT),
]
BatchAxis = Annotated[int, typer.Option(help="Axis of the batch in the inputs.", rich_help_panel=HOW_BUILT)]
Measure = Annotated[
    bool, typer.Option("--measure", help="Place exits by measured time, not by FLOPs.", rich_help_panel=HOW_BUILT)
]

DATA_HELP = (
    "file.py:attr (a loader, or a function that gives one), a .csv, .tsv, .json or .jsonl file of texts and labels, or a "
    "built-in name: digits, digits:val, digits:test, and those of the examples (mnist, fashion_mnist, cifar10, minilm_imdb)."
)
TEXTS = "Texts of a file"
Data = Annotated[
    str,
    typer.Option("--data", help=DATA_HELP, autocompletion=names.completing(names.DATA), show_default=False),
]
Threshold = Annotated[
    list[float] | None,
    typer.Option(help="Instead of the saved thresholds: one, or (repeated) one for each exit. Not saved."),
]
Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="DIR", help="Where to save.", show_default="in place"),
]
Seed = Annotated[int, typer.Option(help="Of everything random.", rich_help_panel=COMMON)]
Json = Annotated[bool, typer.Option("--json", help="The report as JSON on standard output.", rich_help_panel=COMMON)]
Debug = Annotated[bool, typer.Option("--debug", help="Tracebacks of errors.", rich_help_panel=COMMON)]


@dataclass(frozen=True)
class StrategyOptions:
    """What is inserted, as text."""

    strategy: Annotated[
        str,
        typer.Option(
            help="What to insert; `eecompile strategies` describes them.",
            autocompletion=names.completing(names.STRATEGIES),
            rich_help_panel=HOW_BUILT,
        ),
    ] = "branchy"
    exits: Annotated[
        list[str] | None,
        typer.Option(
            help="A number spaced by cost, every-block, or (repeatable) names with wildcards and fractions of the cost.",
            rich_help_panel=HOW_BUILT,
            show_default="the strategy's",
        ),
    ] = None
    head: Annotated[
        str | None,
        typer.Option(
            help=f"{', '.join(names.HEADS)}, or file.py:attr.",
            autocompletion=names.completing(names.HEADS),
            rich_help_panel=HOW_BUILT,
            show_default="the strategy's",
        ),
    ] = None
    criterion: Annotated[
        str | None,
        typer.Option(
            help=f"How sure an exit is: {', '.join(names.CRITERIA)}.",
            autocompletion=names.completing(names.CRITERIA),
            rich_help_panel=HOW_BUILT,
            show_default="the strategy's",
        ),
    ] = None
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--option",
            help="key=value for the strategy, repeatable; values are read as JSON: router=exits sends each row straight to "
            """one exit, 'router={"at": "layer1", "to": {"light": 0.5}}' some rows through half of the blocks after """
            "layer1.",
            rich_help_panel=HOW_BUILT,
        ),
    ] = None
    prepare: Annotated[
        list[str] | None,
        typer.Option(
            help="Of a cascade, once for each model: file.py:attr, what makes its arguments from the inputs, "
            'or "-" for none.',
            rich_help_panel=HOW_BUILT,
        ),
    ] = None


@dataclass(frozen=True)
class ExampleInput:
    """Where an example of the inputs comes from: one of three."""

    example: Annotated[
        str | None,
        typer.Option(
            help="file.py:attr or package.module:attr: a tensor, a tuple, a dict of keyword arguments, or a function "
            "that gives one.",
            rich_help_panel=INPUT,
        ),
    ] = None
    input: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            help='Random input by shape, repeatable: "x=float32[4,3,32,32]", "input_ids=int64[4,128]<1000", '
            '"attention_mask=int64[4,128]=1". Without a name: by position.',
            rich_help_panel=INPUT,
        ),
    ] = None
    data: Annotated[
        str | None,
        typer.Option("--data", help=DATA_HELP, autocompletion=names.completing(names.DATA), rich_help_panel=INPUT),
    ] = None


@dataclass(frozen=True)
class TextOptions:
    """How files of texts are read."""

    tokenizer: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Local Hugging Face directory with the tokenizer.",
            show_default="the model's",
            rich_help_panel=TEXTS,
        ),
    ] = None
    text_column: Annotated[
        list[str] | None,
        typer.Option(
            help="Column with the texts; twice for pairs.",
            show_default="text, sentence, content or review",
            rich_help_panel=TEXTS,
        ),
    ] = None
    label_column: Annotated[
        str | None,
        typer.Option(
            help="Column with the labels: names of the model's label2id, or their numbers.",
            show_default="label, labels, class or target",
            rich_help_panel=TEXTS,
        ),
    ] = None
    max_length: Annotated[
        int | None,
        typer.Option(help="Tokens of a row; the rest is cut.", show_default="what the model takes", rich_help_panel=TEXTS),
    ] = None


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """A command, some of whose parameters are dataclasses like the above: their fields are its options."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: kind for name, kind in hints.items() if is_dataclass(kind)}
    options = []
    for name, p in inspect.signature(command).parameters.items():
        given = [(name, p.default, hints[name])]
        if name in groups:
            inside = get_type_hints(groups[name], include_extras=True)
            given = [(f.name, f.default, inside[f.name]) for f in fields(groups[name])]
        options += [inspect.Parameter(n, p.KEYWORD_ONLY, default=d, annotation=a) for n, d, a in given]

    @functools.wraps(command)
    def run(**given: Any) -> None:
        made = {name: kind(**{f.name: given.pop(f.name) for f in fields(kind)}) for name, kind in groups.items()}
        command(**given, **made)

    run.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
    return run


def output(text: str | None) -> str | int | None:
    """An output by its name or its index."""
    return int(text) if text is not None and text.isdigit() else text
