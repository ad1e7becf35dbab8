"""Tables that a model's own code computes once and keeps: real tensors in the graph, nothing left behind in the model."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eecompile import CaptureError
from eecompile.capture.untouched import untouched
from tests.capture.nets import WIDTH, Net, compiled, made, rows
from tests.support import Fingerprint

LENGTH = 5
TABLES: dict[int, Tensor] = {}
LATEST: Tensor | None = None


def table(length: int) -> Tensor:
    return torch.sin(torch.arange(length).float()[:, None] * torch.arange(WIDTH).float() / 7)


@functools.lru_cache
def remembered(length: int) -> Tensor:
    return table(length)


@functools.lru_cache(maxsize=2)
def bounded(length: int) -> tuple[Tensor, str]:
    return table(length), "sine"


def from_globals(length: int) -> Tensor:
    if length not in TABLES:
        TABLES[length] = table(length)
    return TABLES[length]


def latest(length: int) -> Tensor:
    global LATEST
    if LATEST is None or LATEST.shape[0] < length:
        LATEST = table(length)
    return LATEST[:length]


def enclosed() -> Callable[[int], Tensor]:
    kept = None

    def find(length: int) -> Tensor:
        nonlocal kept
        if kept is None:
            kept = table(length)
        return kept

    return find


def in_default(length: int, kept: dict[int, Tensor] = {}) -> Tensor:  # noqa: B006
    return kept.setdefault(length, table(length))


class Lazy(dict[str, Any]):
    """As the mappings of a library that are filled when asked, and not all of whose entries can be made."""

    def keys(self) -> Any:
        return ["missing"]

    def __getitem__(self, key: str) -> Any:
        if key == "missing":
            raise ValueError("this entry cannot be made")
        return super().__getitem__(key)


LAZY = Lazy()


def lazily(length: int) -> Tensor:
    if "table" not in LAZY:
        LAZY["table"] = table(length)
    found: Tensor = LAZY["table"]
    return found


class Positions:
    """No module: keeps its table on itself, and all of them on the class."""

    every: list[Tensor] = []

    def __init__(self) -> None:
        self.table: Tensor | None = None

    def __call__(self, length: int) -> Tensor:
        if self.table is None:
            self.table = table(length)
            self.every.append(self.table)
        return self.every[0]


class Tables(Net):
    """[B, 5, 16] -> [B, 3]: adds a table to its input."""

    def __init__(self, find: Callable[[int], Tensor]) -> None:
        super().__init__()
        self.find = find

    def forward(self, x: Tensor) -> Any:
        return super().forward(x + self.find(x.shape[1])).mean(1)


class Attribute(Tables):
    def __init__(self) -> None:
        super().__init__(table)
        self.kept: Tensor | None = None
        self.by_length: dict[int, Tensor] = {}

    def forward(self, x: Tensor) -> Any:
        if self.kept is None or x.shape[1] not in self.by_length:
            self.kept = self.by_length[x.shape[1]] = table(x.shape[1])
        return super().forward(x + self.kept + self.by_length[x.shape[1]])


class Stubborn(Tables):
    """Cannot be captured."""

    def forward(self, x: Tensor) -> Any:
        found = super().forward(x)
        return found if float(found.sum()) > 1e9 else found + 1


KINDS: dict[str, Callable[[], Callable[[int], Tensor]]] = {
    "lru_cache": lambda: remembered,
    "lru_cache of two": lambda: lambda length: bounded(length)[0],
    "dict in a global": lambda: from_globals,
    "global": lambda: latest,
    "closure": enclosed,
    "default argument": lambda: in_default,
    "object and class": Positions,
    "a dict that makes its values": lambda: lazily,
}


@pytest.fixture(autouse=True)
def _forgotten() -> None:
    global LATEST
    LATEST = None
    TABLES.clear()
    LAZY.clear()
    Positions.every.clear()
    remembered.cache_clear()
    bounded.cache_clear()


def model_of(kind: str, base: type[Tables] = Tables) -> nn.Module:
    torch.manual_seed(0)
    return base(KINDS[kind]()).eval()


def plain(model: nn.Module, x: Tensor) -> None:
    """The model computes with real tensors of its own, what it computes without a cache."""
    with torch.no_grad():
        got = model(x)
        assert type(got) is Tensor
        model.find = table
        assert torch.equal(got, model(x))


@pytest.mark.parametrize("kind", KINDS)
def test_the_graph_has_the_table_and_the_model_keeps_working(kind: str) -> None:
    model, x = model_of(kind), rows(4, LENGTH, WIDTH)
    fast = compiled(model, x)
    assert not TABLES and LATEST is None and not Positions.every
    with torch.no_grad():
        got = fast(x[:3])
        assert torch.equal(got, model(x[:3]))
    plain(model, x)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_cannot_be_captured_keeps_working(kind: str) -> None:
    model, x = model_of(kind, Stubborn), rows(4, LENGTH, WIDTH)
    with pytest.raises(CaptureError, match="could not be captured"):
        compiled(model, x)
    plain(model, x)


@pytest.mark.parametrize("kind", KINDS)
def test_tables_from_before_are_kept(kind: str) -> None:
    model, x = model_of(kind), rows(4, LENGTH, WIDTH)
    with torch.no_grad():
        want = model(x)
    tables, last = dict(TABLES), LATEST
    fast = compiled(model, x)
    assert list(TABLES) == list(tables) and all(TABLES[n] is t for n, t in tables.items())
    assert LATEST is last
    with torch.no_grad():
        assert torch.equal(fast(x), want)
    plain(model, x)


def test_attributes_of_modules() -> None:
    model, x = made(Attribute), rows(4, LENGTH, WIDTH)
    before = Fingerprint.of(model)
    fast = compiled(model, x)
    before.check(model)
    with torch.no_grad():
        assert torch.equal(fast(x), model(x))


def test_a_trace_of_the_users_own_leaves_nothing() -> None:
    model, x = model_of("dict in a global"), rows(4, LENGTH, WIDTH)
    with untouched(model) as caches:
        model(x)
        assert list(TABLES) == [LENGTH]
        assert caches.put_back()
        assert not caches.put_back()
    assert not TABLES


def test_other_globals_are_left_alone() -> None:
    model, x = model_of("dict in a global"), rows(4, LENGTH, WIDTH)
    with untouched(model):
        TABLES[1] = "no tensor"  # type: ignore[assignment]
        model(x)
    assert TABLES == {1: "no tensor"}
