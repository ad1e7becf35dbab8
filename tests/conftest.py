"""Fixtures of every test: one thread, and the zoo, each model compiled once; and which tests share a process."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from eecompile import CompiledModule, strategies
from tests.support import Fingerprint
from tests.support import compiled as eecompile
from tests.zoo import OFTEN, ZOO, Entry

ROWS = 6  # of the example that a model is compiled with
LONG = (
    "tests/training/test_kept_features.py",
    "tests/kernels/test_interpreter.py",
    "tests/docs/test_code_blocks.py",
    "tests/training/test_processes.py",
    "tests/examples/test_programs.py",
    "tests/test_invariants.py",
    "tests/cli/test_cli.py",
)
"""Groups that take longest come first: in the end no process waits for one of them."""
STARTED = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--stop-after", type=float, metavar="SECONDS", help="skip, by name, the tests that begin later")


def pytest_configure() -> None:
    """Unreachable cycles are collected more rarely: a tenth of the time of all tests was spent on looking for them."""
    gc.set_threshold(500_000, 10, 10)


def pytest_runtest_setup(item: pytest.Item) -> None:
    limit = item.config.getoption("--stop-after")
    if limit is not None and time.monotonic() - STARTED > limit:
        pytest.skip(f"NOT RUN, the time was up: {item.nodeid}")


@pytest.hookimpl(tryfirst=True)  # before `-m` is applied
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With `--dist loadgroup` tests of one model of the zoo share a process: it is compiled once. Others share by file.

    Groups run in the order of their tests (`--no-loadscope-reorder`). What a model of the zoo shows that is not one of
    `OFTEN` is left to `make test-all`. Tests that are marked `last` come after all others, each for itself, so that a run
    that is stopped after some time has reached the others.
    """
    file = {item: str(item.path.relative_to(item.config.rootpath)) for item in items}
    items.sort(key=lambda item: (item.get_closest_marker("last") is not None, file[item] not in LONG))
    for item in items:
        name = item.callspec.params.get("name") if hasattr(item, "callspec") else None
        shared = name in ZOO and "zoo" in getattr(item, "fixturenames", ())
        if shared and name not in OFTEN:
            item.add_marker(pytest.mark.nightly)
        group = item.nodeid if item.get_closest_marker("last") else file[item]
        item.add_marker(pytest.mark.xdist_group(name if shared else group))


@dataclass(frozen=True)
class Animal:
    """A model of the zoo, compiled, with what compiling changed in it."""

    entry: Entry
    model: nn.Module
    fast: CompiledModule
    changes: list[str]
    random_state: tuple[Tensor, Tensor]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The models are tiny, and sums in another order would not be equal bit for bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def zoo() -> Callable[[str], Animal]:
    """`zoo(name)`: the model compiled with three entropy exits, at its first use."""
    kept: dict[str, Animal] = {}

    def get(name: str) -> Animal:
        if name not in kept:
            entry = ZOO[name]
            model = entry.model()
            before = Fingerprint.of(model)
            args, kwargs = entry.inputs(ROWS)
            state = torch.get_rng_state()
            strategy = strategies.Branchy(exits=entry.exits, criterion="entropy")
            fast = eecompile(model, strategy, example_inputs=args, example_kwargs=kwargs, **entry.options)
            kept[name] = Animal(entry, model, fast, before.changes(model), (state, torch.get_rng_state()))
        return kept[name]

    return get
