"""Loaders of texts: a file of texts and labels through the tokenizer of a local Hugging Face directory."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from eecompile.cli import rows as files
from eecompile.cli.hugging_face import library
from eecompile.cli.options import TextOptions
from eecompile.errors import EecompileError, near

KEPT = "tokenizer"  # folder of a saved program with the tokenizer of its model
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model")
NEUTRAL = {"attention_mask": 1, "token_type_ids": 0}  # what a model assumes where it is not given
MOST_TOKENS = 512  # where neither the model nor its tokenizer has a limit
BATCH, CHUNK = 32, 1000
NO_LIMIT = 10**6  # a tokenizer without a limit has a huge one
Tokens = dict[str, list[int]]  # one row, by argument of the model


@dataclass(frozen=True)
class Takes:
    """What a model takes of a tokenizer.

    Attributes:
        names: Its arguments; None where they are not known, and the tokenizer's are taken for them.
        needed: Those that it cannot do without.
        least, most: Tokens of a row; None for no limit.
    """

    names: Sequence[str] | None = None
    needed: Sequence[str] = ()
    least: int = 1
    most: int | None = None

    def __contains__(self, name: str) -> bool:
        return self.names is None or name in self.names

    @classmethod
    def of_program(cls, fast: Any) -> Takes:
        signature = fast.program.signature
        names = [leaf.path for leaf in signature.inputs]
        least, most = 1, None
        for leaf in signature.inputs:
            if len(leaf.shape) == 2 and leaf.batch_axis == 0:
                size = leaf.shape[1]
                low, high = (size, size) if isinstance(size, int) else signature.dynamic[size]
                least = max(least, low)
                most = high if most is None or high is None else min(most, high)
        return cls(names, names, least, most)


@dataclass(frozen=True)
class Texts:
    """How files of texts become batches for one model.

    Attributes:
        home: Directory with a tokenizer, where the model has one.
        say: Called with what was read.
    """

    options: TextOptions
    takes: Takes
    home: Path | None
    say: Callable[[str], None]

    @classmethod
    def of_saved(cls, options: TextOptions, fast: Any, directory: Path, say: Callable[[str], None]) -> Texts:
        """For a saved program: its model's tokenizer was kept with it where the model came from a directory with one."""
        return cls(options, Takes.of_program(fast), _home(directory), say)

    @classmethod
    def of_model(cls, options: TextOptions, spec: str, say: Callable[[str], None]) -> Texts:
        """For MODEL of the command line."""
        return cls(options, Takes(), _home(Path(spec)), say)

    def loader(
        self, path: Path, batch_size: int | None = None, *, shuffle: bool = False, labels: bool = True
    ) -> DataLoader[Any]:
        """Batches `({"input_ids": int64 [B, S], ...}, int64 [B])`, padded to the longest row of the batch.

        Args:
            labels: Whether rows must have labels; without a column of labels batches are the dict alone.

        Raises:
            EecompileError: A file, a row, a column or a label that is not understood; no tokenizer, or one that does not fit
                the model.
            MissingDependencyError: transformers is not installed.
        """
        if batch_size is not None and batch_size < 1:
            raise EecompileError("--batch-size is a number of at least 1", got=batch_size)
        rows = files.read(path)
        columns = files.text_columns(rows, self.options.text_column, path)
        column = files.label_column(rows, self.options.label_column, path, labels)
        home = self.options.tokenizer or self.home
        if home is None:
            raise EecompileError(
                "texts need the tokenizer of the model",
                where=str(path),
                hint="--tokenizer DIR, of a Hugging Face model; `eecompile rewrite` keeps it with a program made from one",
            )
        tokenizer, config = _tokenizer(home), _config(home)
        ids = None if column is None else _labels(rows, column, config)
        most = self._most(tokenizer, config)
        tokens = self._tokens(tokenizer, rows, columns, most)
        self._check(tokenizer, tokens, rows, path, alone=batch_size == 1)
        cut = self._cut(tokenizer, rows, columns, tokens, most)
        self.say(f"{path}: {len(rows)} rows, {max(len(t['input_ids']) for t in tokens)} tokens at most{cut}")
        data = [(t, None if ids is None else ids[i]) for i, t in enumerate(tokens)]
        return DataLoader(
            data,  # type: ignore[arg-type]
            batch_size=batch_size or BATCH,
            shuffle=shuffle,
            generator=torch.Generator().manual_seed(0),
            collate_fn=_Collate(tokenizer, self.takes),
        )

    def _most(self, tokenizer: Any, config: Any) -> int:
        """Tokens of a row at most."""
        known = (self.takes.most, tokenizer.model_max_length, getattr(config, "max_position_embeddings", None))
        limit = min((n for n in known if isinstance(n, int) and 0 < n < NO_LIMIT), default=None)
        asked = self.options.max_length
        if asked is None:
            return limit or MOST_TOKENS
        if asked < self.takes.least or asked > (limit or asked):
            raise EecompileError(
                "--max-length does not fit the model", got=asked, wanted=f"{self.takes.least} to {limit or 'any'} tokens"
            )
        return asked

    def _tokens(self, tokenizer: Any, rows: Sequence[files.Row], columns: list[str], most: int) -> list[Tokens]:
        from rich.console import Console
        from rich.progress import track

        found: list[Tokens] = []
        chunks = range(0, len(rows), CHUNK)
        shown = Console(stderr=True)
        quick = len(chunks) < 2 or not shown.is_terminal
        for start in track(chunks, "tokenize", console=shown, transient=True, disable=quick):
            texts = [[row.text(c) for row in rows[start : start + CHUNK]] for c in columns]
            try:
                made = tokenizer(*texts, truncation=True, max_length=most)
            except Exception as error:  # tokenizers raise many unrelated types
                first = next(iter(str(error).splitlines()), "")
                raise EecompileError(
                    "the tokenizer fails on these texts",
                    where=f"{rows[start].where} and those after it",
                    got=f"{type(error).__name__}: {first}",
                ) from error
            found += [{name: made[name][i] for name in made} for i in range(len(texts[0]))]
        return found

    def _cut(
        self, tokenizer: Any, rows: Sequence[files.Row], columns: list[str], tokens: Sequence[Tokens], most: int
    ) -> str:
        """How many rows were longer, in words."""
        full = [row for row, t in zip(rows, tokens, strict=True) if len(t["input_ids"]) >= most]
        lengths = [len(tokenizer(*(row.text(c) for c in columns))["input_ids"]) for row in full]
        cut = sum(n > most for n in lengths)
        return f"; {cut} of them were cut" if cut else ""

    def _check(
        self, tokenizer: Any, tokens: Sequence[Tokens], rows: Sequence[files.Row], path: Path, *, alone: bool
    ) -> None:
        """Refuses tokens that the model would misread; rows that come `alone` are padded to the shortest it takes only."""
        names = [name for name in tokens[0] if name in self.takes]
        missing = [name for name in self.takes.needed if name not in names]
        if missing or "input_ids" not in names:
            raise EecompileError(
                "the tokenizer does not give what the model takes",
                where=str(path),
                got=", ".join(tokens[0]),
                wanted=", ".join(missing or ["input_ids"]),
                hint="compile it with such a batch as example: eecompile rewrite MODEL -o DIR --data FILE",
            )
        for row, one in zip(rows, tokens, strict=True):
            if not one["input_ids"]:
                raise EecompileError("a text has no tokens", where=row.where, got="an empty text", hint="remove the row")
        lengths = {len(t["input_ids"]) for t in tokens}
        padded = (len(lengths) > 1 and not alone) or min(lengths) < self.takes.least
        if padded and tokenizer.pad_token is None:
            raise EecompileError(
                "rows of different lengths need a padding token, and this tokenizer has none",
                where=str(path),
                hint="name one in its tokenizer_config.json, and as pad_token_id in the model's config.json",
            )
        for name, neutral in NEUTRAL.items():
            if name not in tokens[0] or name in names:
                continue
            if (name == "attention_mask" and padded) or any(v != neutral for t in tokens for v in t[name]):
                raise EecompileError(
                    f"the program was compiled without {name}, and these texts need it",
                    where=str(path),
                    wanted=f"{name} among {', '.join(names)}",
                    hint="compile it with such a batch as example: eecompile rewrite MODEL -o DIR --data FILE",
                )


@dataclass(frozen=True)
class _Collate:
    """Rows of one batch, padded; of what the tokenizer gives, what the model takes."""

    tokenizer: Any
    takes: Takes

    def __call__(self, rows: list[tuple[Tokens, int | None]]) -> Any:
        length = max(self.takes.least, *(len(t["input_ids"]) for t, _ in rows))
        padded = [t for t, _ in rows]
        if any(len(t["input_ids"]) < length for t in padded):
            padded = self.tokenizer.pad(padded, padding="max_length", max_length=length)
            padded = [{name: padded[name][i] for name in padded} for i in range(len(rows))]
        inputs: dict[str, Tensor] = {
            name: torch.tensor([t[name] for t in padded]) for name in padded[0] if name in self.takes
        }
        labels = [label for _, label in rows if label is not None]
        return (inputs, torch.tensor(labels)) if labels else inputs


def _tokenizer(home: Path) -> Any:
    transformers = library(home)
    if not has_tokenizer(home):
        raise EecompileError(
            "there is no tokenizer in this directory", where=str(home), wanted=f"one of {', '.join(TOKENIZER_FILES)}"
        )
    try:
        return transformers.AutoTokenizer.from_pretrained(home, local_files_only=True)
    except Exception as error:  # its readers raise many unrelated types
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise EecompileError("transformers cannot load this tokenizer", where=str(home), got=first) from error


def _config(home: Path) -> Any:
    """Labels and limits of the model; None where the directory does not say."""
    if not (home / "config.json").is_file():
        return None
    return library(home).PretrainedConfig.from_pretrained(home, local_files_only=True)


def _home(directory: Path) -> Path | None:
    """Where the tokenizer of a model's directory or of a saved program is; None where there is none."""
    return next((d for d in (directory / KEPT, directory) if has_tokenizer(d)), None)


def has_tokenizer(directory: Path) -> bool:
    return any((directory / name).is_file() for name in TOKENIZER_FILES)


def _labels(rows: Sequence[files.Row], column: str, config: Any) -> list[int]:
    """Class of every row.

    Raises:
        EecompileError: The model has no classes, or a row has a label that is none of them.
    """
    names: dict[str, int] = {} if config is None else {str(k): int(v) for k, v in config.label2id.items()}
    problem = getattr(config, "problem_type", None)
    if len(names) == 1 or problem not in (None, "single_label_classification"):
        raise EecompileError(
            "labels of a file are classes, one for each row",
            got=f"a model of {len(names)} labels, problem_type {problem}",
            hint="give file.py:attr, a loader of your own",
        )
    found = []
    for row in rows:
        value = row.fields.get(column)
        label = _label(value, names)
        if label is None:
            said = near(str(value), names) if names else "whole numbers from 0"
            ids = f", or {min(names.values())} to {max(names.values())}" if names else ""
            raise EecompileError(
                "unknown label",
                where=f"{row.where}, column {column!r}",
                got="nothing" if value is None else repr(value),
                wanted=f"{said}{ids}",
                hint="labels and their names are label2id of the model's config.json",
            )
        found.append(label)
    return found


def _label(value: Any, names: Mapping[str, int]) -> int | None:
    """A label by its name, else by its number; None where it is neither, or where a number may also be another's name."""
    if isinstance(value, str):
        if value in names:
            return names[value]
        value = int(value) if value.isascii() and value.strip().isdigit() else None
    if isinstance(value, bool) or not isinstance(value, int):
        return None
    if any(name.isdigit() and int(name) != number for name, number in names.items()):
        return None
    return value if value in (names.values() if names else range(2**31)) else None


def keep(source: Path, place: Path, say: Callable[[str], None]) -> None:
    """Keeps the tokenizer of a model's directory, or of another saved program, with a saved program.

    Args:
        source: What the program was made from.
        place: Where it was saved; a tokenizer that another program left there goes.
    """
    if source.resolve() == place.resolve():
        return
    shutil.rmtree(place / KEPT, ignore_errors=True)
    home = _home(source)
    if home is not None:
        try:
            _tokenizer(home).save_pretrained(place / KEPT)
            shutil.copy(home / "config.json", place / KEPT)
        except (EecompileError, OSError) as error:
            say(f"the tokenizer was not kept: {error}")
