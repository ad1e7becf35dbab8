"""MODEL of the command line: what the text names, and the compiled module made from it."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

import eecompile
from eecompile import CompiledModule, EecompileError
from eecompile.artifact.files import MANIFEST
from eecompile.cli import inputs, sources
from eecompile.cli.hugging_face import model_of
from eecompile.cli.options import StrategyOptions
from eecompile.errors import StrategyError
from eecompile.options import CompileOptions
from eecompile.strategies import SelfSpeculative

FORMS = "package.module:attr, file.py:attr, a Hugging Face directory, a .pt2 file, or a saved directory"
TOKENS, ROWS = 32, 4


@dataclass
class Found:
    """What MODEL names.

    Attributes:
        model: A module, a program, the path of a `.pt2` file, or a compiled module.
        call: An example that is known without being given.
    """

    model: nn.Module | ExportedProgram | Path
    call: inputs.Call | None = None


def find(spec: str) -> Found:
    """What the text names.

    Raises:
        EecompileError: Nothing that can be compiled; the message says what was looked for.
    """
    path = Path(spec)
    if path.is_dir():
        if (path / MANIFEST).is_file():
            return Found(eecompile.load(path))
        if (path / "config.json").is_file():
            model, config = model_of(path)
            return Found(model, config_call(config, model))
        raise EecompileError(
            "there is no model in this directory",
            where=spec,
            got=", ".join(sorted(p.name for p in path.iterdir())[:6]) or "nothing",
            wanted=f"{MANIFEST} (saved by eecompile) or config.json (Hugging Face)",
        )
    if path.suffix == ".pt2":
        if not path.is_file():
            raise EecompileError("there is no such file", where=spec, wanted="a .pt2 file of torch.export.save")
        return Found(path)
    if not sources.is_attribute(spec):
        known = "a file, but not one of a model" if path.exists() else "no such file or directory"
        raise EecompileError("this does not name a model", where=spec, got=known, wanted=FORMS)
    found = sources.attribute(spec, "a model")
    if not isinstance(found, nn.Module | ExportedProgram) and callable(found):
        found = sources.made(found, spec, "a model")
    if not isinstance(found, nn.Module | ExportedProgram):
        raise EecompileError("this is no model", where=spec, got=type(found).__name__, wanted="torch.nn.Module")
    return Found(found)


def compiled(
    specs: list[str],
    wanted: StrategyOptions,
    options: CompileOptions,
    call: inputs.Call | None = None,
    progress: Callable[[str], None] | None = None,
) -> CompiledModule:
    """The model that the text names, rewritten; a saved program as it is; several models as a cascade.

    Raises:
        EecompileError: They cannot be found, captured or rewritten.
    """
    each = [find(spec) for spec in specs]
    last = each[-1]
    if len(each) == 1 and isinstance(last.model, CompiledModule):
        return last.model
    args, kwargs = call or last.call or ((), {})
    if isinstance(last.model, nn.Module) and not args and not kwargs:
        raise EecompileError(
            "an example input is needed to capture this model",
            where=specs[-1],
            wanted=f"arguments {', '.join(parameters(last.model))}",
            hint="pass --input name=float32[4,3,32,32], --example file.py:attr, or --data",
        )
    chosen = strategy(wanted)
    if isinstance(chosen, SelfSpeculative):
        raise StrategyError(
            "the command line measures language models and does not rewrite them",
            got=chosen.name,
            hint="eecompile inspect MODEL --speculation --data FILE; to generate, in Python: "
            "eecompile(llm, strategies.SelfSpeculative(), example_kwargs=...).generate(...)",
        )
    model: Any = last.model if len(each) == 1 else [e.model for e in each]
    return eecompile.eecompile(
        model,
        chosen,
        example_inputs=args or None,
        example_kwargs=kwargs or None,
        progress=progress,
        **vars(options),
    )


def decoder(spec: str, wanted: StrategyOptions, loader: Iterable[Any], blocks: str | None) -> Any:
    """The language model that the text names, split; a saved decoder as it is.

    Args:
        loader: Batches of token ids; the first one is the example.

    Raises:
        EecompileError: It cannot be found, is no causal language model, or there is no text.
    """
    found = find(spec).model
    if isinstance(found, nn.Module) and hasattr(found, "speculation"):
        return found
    if not isinstance(found, nn.Module) or isinstance(found, CompiledModule):
        raise EecompileError("this is no language model", where=spec, got=type(found).__name__, wanted="a causal decoder")
    first = next(iter(loader), None)
    if first is None:
        raise EecompileError("there is no text to measure on", wanted="at least one batch of token ids")
    chosen = strategy(replace(wanted, strategy=SelfSpeculative.name))
    example = first if isinstance(first, dict) else {"input_ids": first[0] if isinstance(first, tuple | list) else first}
    return eecompile.eecompile(found, chosen, example_kwargs=example, blocks=blocks)


def parameters(model: nn.Module) -> list[str]:
    """Names of the arguments of a model's forward."""
    return list(inspect.signature(model.forward).parameters)


def strategy(wanted: StrategyOptions) -> Any:
    """The strategy that the options describe.

    Raises:
        StrategyError: Unknown name or option.
        EecompileError: An option that is not key=value.
    """
    described: dict[str, Any] = {"name": wanted.strategy}
    for option in wanted.option or []:
        key, equals, value = option.partition("=")
        if not equals or not key:
            raise EecompileError("a strategy's option is key=value", got=repr(option))
        described[key.strip().replace("-", "_")] = parsed(value)
    if wanted.exits:
        described["exits"] = places(wanted.exits)
    if wanted.head is not None:
        named = sources.is_attribute(wanted.head)
        described["head"] = sources.attribute(wanted.head, "a head") if named else wanted.head
    if wanted.prepare:
        described["prepare"] = [None if p == "-" else sources.attribute(p, "a preparation") for p in wanted.prepare]
    if wanted.criterion is not None:
        described["criterion"] = wanted.criterion
    return eecompile.strategies.strategy(described)


def parsed(value: str) -> Any:
    """A value as JSON, else as the text that it is."""
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def places(exits: list[str]) -> Any:
    """`--exits` as the strategy takes it: a number, "every-block", or a list of names and fractions."""
    if len(exits) == 1 and exits[0].lstrip("+-").isdigit():
        return int(exits[0])
    if exits == ["every-block"]:
        return exits[0]
    found: list[str | float] = []
    for text in exits:
        try:
            found.append(float(text))
        except ValueError:
            found.append(text)
    return found


def config_call(config: Any, model: nn.Module) -> inputs.Call | None:
    """Random tokens or pixels of the sizes in a config; None where it says neither."""
    names = parameters(model)
    if "pixel_values" in names and getattr(config, "image_size", None):
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        channels = getattr(config, "num_channels", 3)
        return inputs.random_call([f"pixel_values=float32[{ROWS},{channels},{height},{width}]"])
    if "input_ids" in names and getattr(config, "vocab_size", None):
        length = min(TOKENS, getattr(config, "max_position_embeddings", TOKENS) or TOKENS)
        shapes = [f"input_ids=int64[{ROWS},{length}]<{config.vocab_size}"]
        if "attention_mask" in names:
            shapes.append(f"attention_mask=int64[{ROWS},{length}]=1")
        return inputs.random_call(shapes)
    return None


def saved(path: Path, thresholds: list[float] | None = None) -> CompiledModule:
    """A saved program, with other thresholds where asked.

    Raises:
        ArtifactError: The directory is missing, truncated, altered or foreign.
        StrategyError: Thresholds that do not fit.
        EecompileError: It holds a decoder, which generates.
    """
    fast = eecompile.load(path)
    if not isinstance(fast, CompiledModule):
        raise EecompileError(
            "this is a saved decoder, and the command is for programs with exits, gates or routes",
            where=str(path),
            hint=f"in Python: eecompile.load({str(path)!r}).generate(**tokens, max_new_tokens=64)",
        )
    if thresholds:
        fast.set_thresholds(thresholds[0] if len(thresholds) == 1 else thresholds)
    return fast


def threads(count: int | None) -> None:
    """Sets torch's threads where asked.

    Raises:
        EecompileError: Less than one.
    """
    if count is None:
        return
    if count < 1:
        raise EecompileError("torch needs at least one thread", got=count)
    torch.set_num_threads(count)
