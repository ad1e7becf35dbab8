"""Arguments and options that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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
Prepare = Annotated[
    list[str] | None,
    typer.Option(
        help='Of a cascade, once for each model: file.py:attr, what makes its arguments from the inputs, or "-" for none.',
        rich_help_panel=HOW_BUILT,
    ),
]
Saved = Annotated[Path, typer.Argument(metavar="DIR", help="A directory written by `eecompile rewrite`.")]

Strategy = Annotated[
    str,
    typer.Option(
        help="What to insert; `eecompile strategies` describes them.",
        autocompletion=names.completing(names.STRATEGIES),
        rich_help_panel=HOW_BUILT,
    ),
]
Exits = Annotated[
    list[str] | None,
    typer.Option(
        help="A number spaced by cost, every-block, or (repeatable) names with wildcards and fractions of the cost.",
        rich_help_panel=HOW_BUILT,
        show_default="the strategy's",
    ),
]
Head = Annotated[
    str | None,
    typer.Option(
        help=f"{', '.join(names.HEADS)}, or file.py:attr.",
        autocompletion=names.completing(names.HEADS),
        rich_help_panel=HOW_BUILT,
        show_default="the strategy's",
    ),
]
Criterion = Annotated[
    str | None,
    typer.Option(
        help=f"How sure an exit is: {', '.join(names.CRITERIA)}.",
        autocompletion=names.completing(names.CRITERIA),
        rich_help_panel=HOW_BUILT,
        show_default="the strategy's",
    ),
]
StrategyOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        help="key=value for the strategy, repeatable; values are read as JSON: router=exits sends each row straight to one "
        """exit, 'router={"at": "layer1", "to": {"light": 0.5}}' some rows through half of the blocks after layer1.""",
        rich_help_panel=HOW_BUILT,
    ),
]
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

Example = Annotated[
    str | None,
    typer.Option(
        help="file.py:attr or package.module:attr: a tensor, a tuple, a dict of keyword arguments, or a function "
        "that gives one.",
        rich_help_panel=INPUT,
    ),
]
Input = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        help='Random input by shape, repeatable: "x=float32[4,3,32,32]", "input_ids=int64[4,128]<1000", '
        '"attention_mask=int64[4,128]=1". Without a name: by position.',
        rich_help_panel=INPUT,
    ),
]
DATA_HELP = (
    "file.py:attr (a loader, or a function that gives one), a .csv, .tsv, .json or .jsonl file of texts and labels, or a "
    "built-in name: digits, digits:val, digits:test, and those of the examples (mnist, fashion_mnist, cifar10, minilm_imdb)."
)
TEXTS = "Texts of a file"
Tokenizer = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Local Hugging Face directory with the tokenizer.",
        show_default="the model's",
        rich_help_panel=TEXTS,
    ),
]
TextColumn = Annotated[
    list[str] | None,
    typer.Option(
        help="Column with the texts; twice for pairs.",
        show_default="text, sentence, content or review",
        rich_help_panel=TEXTS,
    ),
]
LabelColumn = Annotated[
    str | None,
    typer.Option(
        help="Column with the labels: names of the model's label2id, or their numbers.",
        show_default="label, labels, class or target",
        rich_help_panel=TEXTS,
    ),
]
MaxLength = Annotated[
    int | None,
    typer.Option(help="Tokens of a row; the rest is cut.", show_default="what the model takes", rich_help_panel=TEXTS),
]
Data = Annotated[
    str,
    typer.Option("--data", help=DATA_HELP, autocompletion=names.completing(names.DATA), show_default=False),
]
DataForInput = Annotated[
    str | None,
    typer.Option("--data", help=DATA_HELP, autocompletion=names.completing(names.DATA), rich_help_panel=INPUT),
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


def output(text: str | None) -> str | int | None:
    """An output by its name or its index."""
    return int(text) if text is not None and text.isdigit() else text
