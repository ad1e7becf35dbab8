"""Settings: everything that may be set after compiling, as one immutable value on the host.

Thresholds of exits and gates, margins of a router's branches, the halting threshold and the temperatures. Tensors are made
from it; graphs read them by the names below. A call keeps the settings that it began with, whatever is set meanwhile.
"""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from eecompile.errors import StrategyError, near, shown

EXITS, TEMPERATURES, GATES, HALTING, BRANCHES = "exits", "temperatures", "gates", "halting", "branches"

CLOSED = 2.0
"""Above every confidence and score: closes an exit, a gate or a branch, and never halts."""


@dataclass(frozen=True)
class Family:
    """Numbers of one kind, one for each slot.

    Attributes:
        name: "exits", "gates", ...
        slots: What each number belongs to, as users know it.
        neutral: The values with which the model is as it was; None where every value leaves it so.
        what: One slot, in messages.
        number: One number, in messages.
        buffer: Name of the tensor float32 [slots] in graphs.
        positive: Whether 0 is excluded. All numbers are at least 0.
        finite: Whether infinity is excluded.
        any_open: Whether one of the numbers has to be at most 1.
        closed_scale: Where the graph reads the reciprocal of a number, what it reads for one above 1; else None.
    """

    name: str
    slots: tuple[str, ...]
    neutral: tuple[float, ...] | None
    what: str
    number: str
    buffer: str
    positive: bool = False
    finite: bool = False
    any_open: bool = False
    closed_scale: float | None = None

    def check(self, values: Sequence[Any]) -> tuple[float, ...]:
        """The values as float32 numbers.

        Raises:
            StrategyError: A wrong count, or something that is not such a number.
        """
        if len(values) != len(self.slots):
            raise StrategyError(
                f"wrong number of {self.number}s", got=len(values), wanted=f"{len(self.slots)}: {', '.join(self.slots)}"
            )
        found = [self.one(value, slot) for slot, value in zip(self.slots, values, strict=True)]
        if self.any_open and found and min(found) > 1:
            raise StrategyError(f"every {self.what} is closed", got=found, wanted="one of them at 1 or less")
        return tuple(found)

    def one(self, value: Any, slot: str | None = None) -> float:
        """One value as a float32 number.

        Raises:
            StrategyError: It is no such number.
        """
        number = _number(value)
        if number is None or not number >= 0 or (self.positive and number == 0) or (self.finite and number == np.inf):
            low = "above 0" if self.positive else "0 or more"
            wanted = f"{low}, finite" if self.finite else f"{'above 0' if self.positive else '0'} to 1, above 1 closes"
            raise StrategyError(f"a {self.number} is a number of {low}", where=slot, got=shown(value), wanted=wanted)
        return float(np.float32(number))

    def tensor(self, values: Sequence[float]) -> Tensor:
        """[slots] float32, as graphs read it."""
        if self.closed_scale is not None:
            values = [self.closed_scale if v > 1 else 1.0 / v for v in values]
        return torch.tensor(values, dtype=torch.float32)

    def values_of(self, tensor: Tensor) -> list[float]:
        """The inverse of `tensor`."""
        values = [float(v) for v in tensor.detach().float().flatten().tolist()]
        if self.closed_scale is None:
            return values
        return [CLOSED if v == self.closed_scale else 1.0 / v if v else np.inf for v in values]


def exits(names: Sequence[str]) -> Family:
    """Confidence from which a row leaves at each exit; above 1 it is closed."""
    closed = (CLOSED,) * len(names)
    return Family(EXITS, tuple(names), closed, "exit", "threshold", "eecompile_thresholds")


def temperatures(names: Sequence[str]) -> Family:
    """Softmax temperature of each exit and, last, of the model's own output."""
    slots = (*names, "model")
    return Family(
        TEMPERATURES, slots, None, "exit", "temperature", "eecompile_temperatures", positive=True, finite=True
    )  # fmt: skip


def gates(names: Sequence[str]) -> Family:
    """Score from which each gate is open; 0 is always open, above 1 always closed."""
    return Family(GATES, tuple(names), (0.0,) * len(names), "gate", "threshold", "eecompile_gate_thresholds")


def halting(closed_scale: float) -> Family:
    """What halting scores must add up to: 1 as trained, less stops sooner, above 1 never stops."""
    return Family(
        HALTING, ("halting",), (CLOSED,), "chain", "halting threshold", "eecompile_halt_scale", positive=True,
        closed_scale=closed_scale,
    )  # fmt: skip


def branches(names: Sequence[str]) -> Family:
    """What the probability of each branch is lowered by before the largest is taken; above 1 the branch is closed. The last
    one is the model's own."""
    neutral = (*(CLOSED for _ in names[1:]), 0.0)
    return Family(BRANCHES, tuple(names), neutral, "route", "margin", "eecompile_route_margins", any_open=True)


THRESHOLDS_BUFFER, TEMPERATURES_BUFFER = exits(()).buffer, temperatures(()).buffer
GATES_BUFFER, HALTING_BUFFER, BRANCHES_BUFFER = gates(()).buffer, halting(0.0).buffer, branches(("model",)).buffer
BUFFERS = (THRESHOLDS_BUFFER, TEMPERATURES_BUFFER, GATES_BUFFER, HALTING_BUFFER, BRANCHES_BUFFER)
"""Names of the tensors that graphs read settings from."""


@dataclass(frozen=True)
class Settings:
    """Values of all families of a program."""

    families: tuple[Family, ...] = ()
    values: tuple[tuple[float, ...], ...] = ()
    _tensors: dict[torch.device, dict[str, Tensor]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __contains__(self, name: str) -> bool:
        return any(f.name == name for f in self.families)

    def __getitem__(self, name: str) -> tuple[float, ...]:
        """Values of a family; none where the program has none of its kind."""
        for f, values in zip(self.families, self.values, strict=True):
            if f.name == name:
                return values
        return ()

    def add(self, family: Family, values: Sequence[Any]) -> Settings:
        """With these slots too. Slots that are there already keep their values."""
        before = dict(zip((f.name for f in self.families), zip(self.families, self.values, strict=True), strict=True))
        known, old = before.get(family.name, (replace(family, slots=(), neutral=()), ()))
        new = [i for i, slot in enumerate(family.slots) if slot not in known.slots]
        slots = (*known.slots, *(family.slots[i] for i in new))
        neutral = None
        if family.neutral is not None and known.neutral is not None:
            neutral = (*known.neutral, *(family.neutral[i] for i in new))
        merged = replace(family, slots=slots, neutral=neutral)
        checked = merged.check([*old, *(values[i] for i in new)])
        before[family.name] = merged, checked
        return Settings(tuple(f for f, _ in before.values()), tuple(v for _, v in before.values()))

    def with_values(self, name: str, given: Any) -> Settings:
        """With other values of a family: one number for all, one for each slot in order, or by slot.

        Raises:
            StrategyError: A wrong count, an unknown slot, or a number out of range.
        """
        at = next((i for i, f in enumerate(self.families) if f.name == name), None)
        if at is None:
            names = [f.name for f in self.families]
            raise StrategyError("this program has no such settings", got=name, wanted=near(name, names) if names else "none")
        family = self.families[at]
        values: list[Any]
        if isinstance(given, Mapping):
            values = list(self.values[at])
            for slot, value in given.items():
                if slot not in family.slots:
                    raise StrategyError(f"no {family.what} has this name", got=slot, wanted=near(str(slot), family.slots))
                values[family.slots.index(slot)] = value
        elif isinstance(given, Sequence) and not isinstance(given, str):
            values = list(given)
        elif isinstance(given, Tensor | np.ndarray) and given.ndim:
            values = given.reshape(-1).tolist()
        else:
            values = [given] * len(family.slots)
            if not values:
                family.one(given)
        return replace(self, values=(*self.values[:at], family.check(values), *self.values[at + 1 :]))

    def neutral(self, *names: str) -> Settings:
        """The model as it was: exits closed, gates open, halting off, rows on the model's own route.

        Args:
            names: Families that are set so; all of them without.
        """
        found = tuple(
            v if f.neutral is None or (names and f.name not in names) else f.neutral
            for f, v in zip(self.families, self.values, strict=True)
        )
        return replace(self, values=found)

    @cached_property
    def open_exits(self) -> tuple[int, ...]:
        """Indices of the exits that rows may leave at."""
        return tuple(i for i, t in enumerate(self[EXITS]) if t <= 1.0)

    @property
    def halts(self) -> bool:
        """Whether rows may halt."""
        return any(t <= 1 for t in self[HALTING])

    def tensors(self, device: torch.device) -> dict[str, Tensor]:
        """By buffer name, float32, made once for each device. Not to be written to."""
        found = self._tensors.get(device)
        if found is None:
            with unset_fake_temporarily(), torch.inference_mode(False):
                found = {f.buffer: f.tensor(v).to(device) for f, v in zip(self.families, self.values, strict=True)}
            self._tensors[device] = found
        return found

    def attach(self, module: nn.Module, device: torch.device) -> None:
        """Registers a copy of each tensor as a buffer of `module`, where its state dict has it and its graph reads it."""
        for name, tensor in self._copies(device).items():
            module.register_buffer(name, tensor)

    def put_into(self, module: nn.Module, device: torch.device) -> None:
        """Puts a copy of each tensor in the place of the buffers that a graph and those within it have by these names.

        What is no graph holds buffers of the user's model, which may be named so too.
        """
        copies = self._copies(device)
        for part in module.modules():
            for name in copies.keys() & part._buffers.keys() if isinstance(part, fx.GraphModule) else ():
                part._buffers[name] = copies[name]

    def _copies(self, device: torch.device) -> dict[str, Tensor]:
        with unset_fake_temporarily(), torch.inference_mode(False):
            return {name: tensor.clone() for name, tensor in self.tensors(device).items()}

    def read_from(self, buffers: Mapping[str, Tensor | None]) -> Settings:
        """The values that are in these buffers.

        Raises:
            StrategyError: A number there is out of range.
        """
        found = []
        for f, values in zip(self.families, self.values, strict=True):
            tensor = buffers.get(f.buffer)
            found.append(values if tensor is None else f.check(f.values_of(tensor)))
        return replace(self, values=tuple(found))

    def to_dict(self) -> dict[str, dict[str, float]]:
        """Family, slot, value; as JSON data."""
        return {f.name: dict(zip(f.slots, v, strict=True)) for f, v in zip(self.families, self.values, strict=True)}

    def from_dict(self, data: Mapping[str, Mapping[str, float]]) -> Settings:
        """With the values of `to_dict`.

        Raises:
            StrategyError: Families or slots of another program.
        """
        if {name: set(slots) for name, slots in data.items()} != {f.name: set(f.slots) for f in self.families}:
            got, wanted = ({n: list(s) for n, s in d.items()} for d in (data, self.to_dict()))
            raise StrategyError("these settings belong to another program", got=got, wanted=wanted)
        found = self
        for name, values in data.items():
            found = found.with_values(name, values)
        return found


def _number(value: Any) -> float | None:
    """A plain number out of Python's, NumPy's and torch's; None for anything else."""
    if isinstance(value, Tensor | np.ndarray) and value.ndim == 0:
        value = value.item()
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Real):
        return None
    try:
        return float(value)
    except OverflowError:  # an int of more digits than a float has
        return None
