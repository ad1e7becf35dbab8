"""Settings that wait for training: until then the compiled module answers like the model.

Exits with untrained heads are closed, gates with untrained units open, halting with untrained units off, and an untrained
router sends every row the model's own way. What the strategy wants instead waits: it is set in train mode, where heads and
units learn under the settings that they will have, and stays set for whatever has been trained by the end of it. A setting
that is made meanwhile (`set_thresholds` and the like, `calibrate`, `settings`) ends the waiting.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from eecompile.errors import UntrainedWarning
from eecompile.ir.settings import BRANCHES, EXITS, GATES, HALTING, Settings
from eecompile.untrained import is_untrained, mark_untrained

NOT_TRAINED = "not trained yet"
Values = dict[str, dict[str, float]]


class Waiting:
    """The settings of one compiled module that wait.

    Attributes:
        values: By family and slot, what waits there.
    """

    def __init__(self, fast: Any) -> None:
        self.fast = fast
        self.values: Values = {}
        self.learning = False  # whether what waits is set at the moment
        self.warned = False
        self.measuring = False

    def begin(self) -> None:
        """After compiling: every slot of an untrained unit waits."""
        now = self.fast.settings
        for family, new in untrained_slots(self.fast).items():
            slots = zip(now.to_dict()[family].items(), new, strict=True)
            self.values[family] = {slot: value for (slot, value), is_new in slots if is_new}
        self.fast.settings = self._with(self._neutral())

    def follow(self, training: bool) -> None:
        """Sets what waits in train mode; afterwards only what has been trained stays set."""
        if training == self.learning or not any(self.values.values()):
            return
        self._drop_what_was_set()
        self.learning = training
        if training:
            self.fast.settings = self._with(self.values)
            return
        for family, new in untrained_slots(self.fast).items():
            still = {slot for slot, is_new in zip(self.fast.settings.to_dict()[family], new, strict=True) if is_new}
            self.values[family] = {slot: v for slot, v in self.values.get(family, {}).items() if slot in still}
        self.fast.settings = self._with(self._neutral())

    def wanted(self) -> Settings:
        """The settings with what waits in its place."""
        return self._with(self.values)

    def settled(self, family: str, given: Any = None) -> None:
        """The user has set these slots: nothing waits there. Warns once of untrained ones that are open."""
        if self.measuring:
            return
        kept = self.values.get(family, {})
        self.values[family] = {s: v for s, v in kept.items() if isinstance(given, Mapping) and s not in given}
        if not self.warned and not self.fast.training:
            self._warn(family)

    def _warn(self, family: str) -> None:
        neutral, now = self.fast.settings.neutral().to_dict().get(family, {}), self.fast.settings.to_dict().get(family, {})
        used = {s for s, v in now.items() if v != neutral[s] and not (family == EXITS and v > 1)}
        if not used:
            return
        opened = [s for s, new in zip(now, untrained_slots(self.fast)[family], strict=True) if new and s in used]
        if opened:
            self.warned = True
            warnings.warn(
                f"{', '.join(opened)}: {NOT_TRAINED}, so what decides there is random; call fit() first, or load weights",
                UntrainedWarning,
                stacklevel=4,
            )

    @contextlib.contextmanager
    def measurement(self, settles: bool) -> Iterator[None]:
        """Settings that are made meanwhile are none of the user's; those of a calibration are, if it succeeded."""
        self.measuring, before = True, self.measuring
        try:
            yield
        finally:
            self.measuring = before
        if settles:
            self.values.pop(EXITS, None)
            self._drop_what_was_set()

    def _drop_what_was_set(self) -> None:
        """Nothing waits where another value than ours is set by now."""
        ours, now = self.values if self.learning else self._neutral(), self.fast.settings.to_dict()
        self.values = {
            family: {s: v for s, v in slots.items() if now[family][s] == ours[family][s]}
            for family, slots in self.values.items()
        }

    def _neutral(self) -> Values:
        neutral = self.fast.settings.neutral().to_dict()
        return {family: {s: neutral[family][s] for s in slots} for family, slots in self.values.items()}

    def _with(self, values: Values) -> Settings:
        found: Settings = self.fast.settings
        for family, slots in values.items():
            found = found.with_values(family, slots) if slots else found
        return found

    def to_dict(self) -> dict[str, Any]:
        """As JSON data, with the modules that are untrained."""
        marked = [name for name, m in self.fast.graph_module.named_modules() if is_untrained(m)]
        return {"values": self.values, "modules": marked}

    def restore(self, data: Mapping[str, Any]) -> None:
        """The inverse of `to_dict`, in a program whose weights are loaded."""
        for name in data["modules"]:
            mark_untrained(self.fast.graph_module.get_submodule(name))
        self.values = {family: dict(slots) for family, slots in data["values"].items()}


def untrained_slots(fast: Any) -> dict[str, list[bool]]:
    """By family, for each slot whether what decides there is untrained; families that the program has."""
    program, found = fast.program, {}
    seen: dict[str, bool] = {}

    def new(path: str) -> bool:
        if path not in seen:
            seen[path] = is_untrained(fast.graph_module.get_submodule(path))
        return seen[path]

    if EXITS in fast.settings:
        found[EXITS] = [any(map(is_untrained, units_of(fast, e))) for e in program.exits]
    if GATES in fast.settings:
        found[GATES] = [new(g.unit) for g in program.gates]
    if HALTING in fast.settings:  # a last step's unit may learn nothing
        found[HALTING] = [all(new(s.unit) for h in program.halts for s in h.steps)]
    if BRANCHES in fast.settings:
        router = is_untrained(fast.route_units.unit)
        found[BRANCHES] = [router] * (len(fast.settings[BRANCHES]) - 1) + [False]
    return found


def untrained_names(fast: Any) -> tuple[str, ...]:
    """Exits, gates, "halting" and branches that nobody has trained."""
    slots = fast.settings.to_dict()
    return tuple(
        s for family, new in untrained_slots(fast).items() for s, is_new in zip(slots[family], new, strict=True) if is_new
    )


def units_of(fast: Any, e: Any) -> tuple[nn.Module, ...]:
    """What must be trained before an exit says anything: its head, its score, the router that sends rows there."""
    branch = fast.branch(e.name)
    units = (branch.head,) if branch.score is None else (branch.head, branch.score)
    return (*units, fast.route_units.unit) if e.criterion.routed else units
