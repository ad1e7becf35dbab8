"""Example inputs: from `--example`, from `--input` shapes, from `--data`, or from a Hugging Face config."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from eecompile.benchmark import as_call
from eecompile.cli import data, sources
from eecompile.cli.options import ExampleInput
from eecompile.cli.text import Texts
from eecompile.errors import EecompileError, near

Call = tuple[tuple[Any, ...], dict[str, Any]]
PATTERN = re.compile(
    r"(?:(?P<name>[A-Za-z_]\w*)=)?(?P<dtype>\w+)\[(?P<sizes>[\d,\s]*)\](?:<(?P<below>\d+)|=(?P<value>-?[\d.]+))?"
)
DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
FORM = "name=dtype[sizes], such as x=float32[4,3,32,32], ids=int64[4,128]<1000 or mask=int64[4,128]=1"


def example(
    given: ExampleInput,
    rows: int | None = None,
    seed: int = 0,
    texts: Texts | None = None,
) -> Call | None:
    """Arguments and keyword arguments of one call; None where nothing was said.

    Args:
        rows: How many rows to take from data.
        texts: How files of texts are read.

    Raises:
        EecompileError: Two sources at once, or one that is not understood.
    """
    named = [f"--{name}" for name, value in vars(given).items() if value]
    if len(named) > 1:
        raise EecompileError("two example inputs", got=" and ".join(named), wanted="one of them")
    if given.example:
        return _object(given.example)
    if given.input:
        return random_call(given.input, seed)
    if given.data:
        args, kwargs, _ = data.first_rows(data.loader(given.data, rows, texts, labels=False), rows or data.ROWS_OF_EXAMPLE)
        return args, kwargs
    return None


def _object(spec: str) -> Call:
    found = sources.attribute(spec, "an example input")
    if callable(found) and not isinstance(found, Tensor | Mapping):
        found = sources.made(found, spec, "an example input")
    try:
        return as_call(found)
    except EecompileError as error:
        raise EecompileError("this is no example input", where=spec, got=error.got, wanted=error.what) from error


def random_call(shapes: list[str], seed: int = 0) -> Call:
    """Random tensors by description, by position or by name.

    Raises:
        EecompileError: A description that is not understood; the message shows the form.
    """
    generator = torch.Generator().manual_seed(seed)
    args: list[Tensor] = []
    kwargs: dict[str, Tensor] = {}
    for text in shapes:
        found = PATTERN.fullmatch(text.replace(" ", ""))
        if found is None:
            raise EecompileError("this input is not understood", got=repr(text), wanted=FORM)
        name = found["name"]
        if name in kwargs:
            raise EecompileError("an input is given twice", got=name)
        if name is None and kwargs:
            raise EecompileError("an input without a name after one with a name", got=repr(text), wanted=FORM)
        tensor = _tensor(text, found, generator)
        if name is None:
            args.append(tensor)
        else:
            kwargs[name] = tensor
    return tuple(args), kwargs


def _tensor(text: str, found: re.Match[str], generator: torch.Generator) -> Tensor:
    if found["dtype"] not in DTYPES:
        raise EecompileError("unknown dtype", where=text, got=found["dtype"], wanted=near(found["dtype"], DTYPES))
    dtype: torch.dtype = getattr(torch, found["dtype"])
    sizes = [int(s) for s in found["sizes"].split(",") if s]
    if found["value"] is not None:
        return torch.full(sizes, float(found["value"])).to(dtype)
    if dtype.is_floating_point:
        if found["below"] is not None:
            raise EecompileError("only integers have a bound", got=repr(text), wanted=FORM)
        return torch.randn(sizes, generator=generator).to(dtype)
    below = 2 if dtype is torch.bool else found["below"]
    if below is None:
        raise EecompileError(
            "random integers need a bound", got=repr(text), wanted=f"{text}<1000 (a vocabulary's size), or {text}=1"
        )
    return torch.randint(0, int(below), sizes, generator=generator).to(dtype)
