"""Rows of a CSV, TSV, JSON or text file: what a row holds, where it stands, and which columns are texts and labels."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from eecompile.errors import EecompileError, near

DELIMITERS = {".csv": ",", ".tsv": "\t"}
FORMATS = (*DELIMITERS, ".json", ".jsonl", ".txt")
TEXTS = ("text", "sentence", "content", "review")
OBJECT = '{"text": ..., "label": ...}'
LABELS = ("label", "labels", "class", "target")


@dataclass(frozen=True)
class Row:
    """One row of a file.

    Attributes:
        where: Path and number of the row, from 1 without the header.
    """

    where: str
    fields: dict[str, Any]

    def text(self, column: str) -> str:
        """The text in a column.

        Raises:
            EecompileError: There is none, or something else.
        """
        found = self.fields.get(column)
        if not isinstance(found, str):
            got = "nothing" if found is None else f"{type(found).__name__}: {found!r}"
            raise EecompileError("a row has no text", where=f"{self.where}, column {column!r}", got=got, wanted="a text")
        return found


def read(path: Path) -> list[Row]:
    """All rows, in order.

    Raises:
        EecompileError: No such file, no rows, another encoding than UTF-8, or a row that does not fit the header.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            parse = _table if path.suffix in DELIMITERS else _lines if path.suffix == ".txt" else _objects
            rows = list(parse(file, path))
    except UnicodeDecodeError as error:
        raise EecompileError(
            "this file is not UTF-8",
            where=str(path),
            got=f"byte 0x{error.object[error.start]:02x}: {error.reason}",
            hint="convert it: iconv -f latin1 -t utf-8 FILE > NEW",
        ) from error
    except OSError as error:
        raise EecompileError("this file cannot be read", where=str(path), got=error.strerror or str(error)) from error
    if not rows:
        raise EecompileError("this file has no rows", where=str(path), wanted=f"columns such as {TEXTS[0]} and {LABELS[0]}")
    return rows


def _table(file: TextIO, path: Path) -> Iterator[Row]:
    limit = csv.field_size_limit(sys.maxsize if sys.maxsize < 2**31 else 2**31 - 1)  # texts may be long
    try:
        reader = csv.DictReader(file, delimiter=DELIMITERS[path.suffix], strict=True)
        header = list(reader.fieldnames or ())
        if len(set(header)) < len(header):
            raise EecompileError("two columns of this file have one name", where=str(path), got=", ".join(header))
        for number, fields in enumerate(reader, 1):
            where = f"{path}, row {number} (up to line {reader.line_num})"
            if None in fields or None in fields.values():
                count = sum(v is not None for k, v in fields.items() if k is not None) + len(fields.get(None) or ())
                raise EecompileError(
                    "a row has another number of fields than the header",
                    where=where,
                    got=count,
                    wanted=f"{len(header)}: {', '.join(header)}",
                    hint='a text that holds the delimiter stands in quotes: "so, it is"',
                )
            yield Row(where, dict(fields))
    except csv.Error as error:
        raise EecompileError("this file is no table", where=f"{path}, line {reader.line_num}", got=str(error)) from error
    finally:
        csv.field_size_limit(limit)


def _lines(file: TextIO, path: Path) -> Iterator[Row]:
    """Plain text: each line that is not blank is a row."""
    for line, text in enumerate(file, 1):
        if text.strip():
            yield Row(f"{path}, line {line}", {TEXTS[0]: text.rstrip("\r\n")})


def _objects(file: TextIO, path: Path) -> Iterator[Row]:
    """JSON lines, or one JSON list of objects."""
    text = file.read()
    try:
        found = json.loads(text) if text.lstrip().startswith("[") else None
    except json.JSONDecodeError as error:
        raise EecompileError("this is not JSON", where=f"{path}, line {error.lineno}", got=error.msg) from error
    if found is not None:
        yield from (_object(value, f"{path}, row {number}") for number, value in enumerate(found, 1))
        return
    number = 0
    for line, row in enumerate(text.split("\n"), 1):
        if not row.strip():
            continue
        number += 1
        where = f"{path}, row {number} (line {line})"
        try:
            yield _object(json.loads(row), where)
        except json.JSONDecodeError as error:
            raise EecompileError(
                "this line is not JSON", where=where, got=error.msg, wanted=f"one object on each line: {OBJECT}"
            ) from error


def _object(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise EecompileError("a row is no object", where=where, got=type(value).__name__, wanted=OBJECT)
    return Row(where, value)


def text_columns(rows: Sequence[Row], asked: Sequence[str] | None, path: Path) -> list[str]:
    """The columns with texts: one, or two for pairs.

    Raises:
        EecompileError: No such column, or more than two.
    """
    if asked is not None and len(asked) > 2:
        raise EecompileError("a tokenizer takes one text or a pair", got=f"{len(asked)} of --text-column")
    return [_column(rows, name, TEXTS, "--text-column", path) for name in asked or (None,)]


def label_column(rows: Sequence[Row], asked: str | None, path: Path, needed: bool) -> str | None:
    """The column with labels; None where there is none and none is needed.

    Raises:
        EecompileError: No such column.
    """
    if asked is None and not needed and not any(name in rows[0].fields for name in LABELS):
        return None
    return _column(rows, asked, LABELS, "--label-column", path)


def _column(rows: Sequence[Row], asked: str | None, defaults: Sequence[str], option: str, path: Path) -> str:
    there = list(rows[0].fields)
    if asked is not None:
        if asked not in there:
            raise EecompileError("there is no such column", where=str(path), got=repr(asked), wanted=near(asked, there))
        return asked
    for name in defaults:
        if name in there:
            return name
    raise EecompileError(
        f"which column is the {defaults[0]}?",
        where=str(path),
        got=", ".join(there),
        wanted=f"one named {', '.join(defaults)}",
        hint=f"name it: {option} {there[0] if there else 'NAME'}",
    )
