"""Settings that a compiled module runs under: those of eval mode, and those wanted once everything is trained.

Until what decides at a slot is trained, eval mode has the neutral value there: exits with untrained heads are closed, gates
with untrained units open, halting with untrained units off, and an untrained router sends every row the model's own way. So
the module answers like the model. Train mode has the wanted value, under which heads and units learn, and eval mode takes it
over for whatever has been trained by the end. A value set by the user, or by calibration, holds for both.
"""

from __future__ import annotations

import contextlib
import copy
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from eecompile.errors import StrategyError, UntrainedWarning
from eecompile.ir.settings import EXITS, Settings
from eecompile.passes import facts
from eecompile.passes.place_routes import ROUTES
from eecompile.program import Exit, Program
from eecompile.untrained import is_untrained, mark_untrained

NOT_TRAINED = "not trained yet"


class LiveSettings:
    """Settings of one program, and their copies in the buffers that its graphs read.

    Safe to use from several threads: a call takes one immutable value. What is written to a buffer, by `load_state_dict`
    say, counts from the next call on.

    Args:
        program: A marked program; its settings hold in both modes.

    Attributes:
        evaluated: Under eval mode.
        wanted: Under train mode.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.evaluated = self.wanted = program.settings
        self._training = self._warned = self._measuring = False
        self._lock = threading.RLock()
        self.publish()

    # ------------------------------------------------------------------ what calls take

    @property
    def current(self) -> Settings:
        """The settings of a call that begins now."""
        if self._written():
            with self._lock:  # a state dict was loaded, a buffer written to, or settings are being set now
                if self._written():
                    written = dict(self._graph._buffers)
                    before = self._current
                    self.publish()  # stays, where what is written there is out of range
                    self.replace(before.read_from(written))
                return self._current
        return self._current

    @property
    def _graph(self) -> nn.Module:
        assert self.program.marked is not None
        return self.program.marked

    def _written(self) -> bool:
        """Whether the buffers hold something else than the settings were put there as."""
        buffers = self._graph._buffers
        for name, (tensor, version) in self._attached.items():
            now = buffers[name]
            if now is not tensor or now._version != version:
                return True
        return False

    def publish(self) -> None:
        """Puts the settings of the present mode into the buffers of the graphs, on the device where these are now."""
        current = self.wanted if self._training else self.evaluated
        device = facts.device_of(self._graph)
        with self._lock:
            for graph in (self._graph, self.program.graph_module):
                current.put_into(graph, device)
            buffers = self._graph._buffers
            found: dict[str, Tensor] = {f.buffer: t for f in current.families if (t := buffers[f.buffer]) is not None}
            self._current = current
            self._attached = {name: (t, t._version) for name, t in found.items()}

    # ------------------------------------------------------------------ setting

    def replace(self, new: Settings) -> None:
        """Takes over a whole value; slots that it changes have that value in the other mode too.

        Raises:
            StrategyError: Settings of another program.
        """
        if new.families != self.program.settings.families:
            raise StrategyError(
                "these settings belong to another program", got=new.to_dict(), wanted=self.program.settings.to_dict()
            )
        with self._lock:
            before = self._current
            if self._training:
                self.evaluated, self.wanted = _changed(self.evaluated, before, new), new
            else:
                self.evaluated, self.wanted = new, _changed(self.wanted, before, new)
            self.publish()

    def set(self, values: Mapping[str, Any]) -> None:
        """Sets families, or some of their slots, in both modes. Warns once of untrained slots that are open then.

        Args:
            values: By family, as `Settings.with_values` takes them.

        Raises:
            StrategyError: A wrong count, an unknown slot, or a number out of range.
        """

        def applied(settings: Settings) -> Settings:
            for family, given in values.items():
                settings = settings.with_values(family, given)
            return settings

        with self._lock:
            current = self.current  # with what was written to a buffer meanwhile
            if self._measuring:
                self.replace(applied(current))
                return
            self.evaluated, self.wanted = applied(self.evaluated), applied(self.wanted)
            self.publish()
        if not self._warned and not self._training:
            self._warn(values)

    def _warn(self, families: Iterable[str]) -> None:
        untrained, opened = self.untrained_slots(), list[str]()
        slots, neutral = self.evaluated.to_dict(), self.evaluated.neutral().to_dict()
        for family in untrained.keys() & set(families):
            for (slot, value), is_new in zip(slots[family].items(), untrained[family], strict=True):
                if is_new and value != neutral[family][slot] and not (family == EXITS and value > 1):
                    opened.append(slot)
        if opened:
            self._warned = True
            warnings.warn(
                f"{', '.join(opened)}: {NOT_TRAINED}, so what decides there is random; call fit() first, or load weights",
                UntrainedWarning,
                stacklevel=4,
            )

    @contextlib.contextmanager
    def measuring(self) -> Iterator[None]:
        """Settings made inside are not the user's: what waits for training goes on waiting."""
        wanted, outer, self._measuring = self.wanted, self._measuring, True
        try:
            yield
        finally:
            self._measuring, self.wanted = outer, wanted

    def calibrated(self, new: Settings) -> None:
        """Takes over settings that were found by calibration, in eval mode: all its exits are settled by them."""
        self.replace(new)
        if EXITS in new:
            self.wanted = self.wanted.with_values(EXITS, new[EXITS])

    # ------------------------------------------------------------------ training

    def hold_back(self) -> None:
        """After compiling: eval mode has neutral values in the slots of untrained units."""
        self.evaluated = self._with_slots(self.wanted, self.wanted.neutral(), trained=False)
        self.publish()

    def open_all(self) -> None:
        """Everything counts as trained."""
        self.evaluated = self.wanted
        self.publish()

    def follow(self, training: bool) -> None:
        """Switches to train or eval mode; eval mode takes the wanted values of what has been trained."""
        if training == self._training:
            return
        _ = self.current  # takes over what was written to a buffer
        self._training = training
        if self.evaluated == self.wanted:
            return
        if not training:
            self.evaluated = self._with_slots(self.evaluated, self.wanted, trained=True)
        self.publish()

    def _with_slots(self, base: Settings, other: Settings, trained: bool) -> Settings:
        """`base`, with the values of `other` in the slots of trained or of untrained units."""
        values = other.to_dict()
        for family, new in self.untrained_slots().items():
            chosen = {s: v for (s, v), is_new in zip(values[family].items(), new, strict=True) if is_new != trained}
            base = base.with_values(family, chosen)
        return base

    def untrained_slots(self) -> dict[str, list[bool]]:
        """By family of the program, for each slot whether what decides there is untrained."""
        program, found = self.program, {}
        seen: dict[str, bool] = {}

        def new(path: str) -> bool:
            if path not in seen:
                seen[path] = is_untrained(self._graph.get_submodule(path))
            return seen[path]

        if EXITS in program.settings:
            found[EXITS] = [any(map(is_untrained, units_of(program, e))) for e in program.exits]
        for family, slots in program.settings.to_dict().items():
            units = [[d.unit for d in program.choices.deciders if d.family == family and s in d.slots] for s in slots]
            if any(units):
                # Halting has a unit for each step, and that of the last one may learn nothing.
                found[family] = [bool(mine) and all(map(new, mine)) for mine in units]
        return found

    def untrained_names(self) -> tuple[str, ...]:
        """Untrained exits, gates and branches, and "halting"."""
        slots = self.program.settings.to_dict()
        flags = self.untrained_slots().items()
        return tuple(s for family, new in flags for s, is_new in zip(slots[family], new, strict=True) if is_new)

    # ------------------------------------------------------------------ saving and copying

    def to_dict(self) -> dict[str, Any]:
        """Both values and the paths of the untrained modules, as JSON data."""
        marked = [name for name, m in self._graph.named_modules() if is_untrained(m)]
        return {"evaluated": self.evaluated.to_dict(), "wanted": self.wanted.to_dict(), "untrained": marked}

    def restore(self, data: Mapping[str, Any]) -> None:
        """The inverse of `to_dict`, in a program whose weights are loaded.

        Raises:
            StrategyError: Settings of another program.
        """
        for name in data["untrained"]:
            mark_untrained(self._graph.get_submodule(name))
        base = self.program.settings
        self.evaluated, self.wanted = base.from_dict(data["evaluated"]), base.from_dict(data["wanted"])
        self.publish()

    def __deepcopy__(self, memo: dict[int, Any]) -> LiveSettings:
        new = LiveSettings(copy.deepcopy(self.program, memo))
        new.evaluated, new.wanted = self.evaluated, self.wanted
        new._training, new._warned = self._training, self._warned
        new.publish()
        return new


def _changed(base: Settings, before: Settings, after: Settings) -> Settings:
    """`base`, with the slots of `after` that differ from `before`."""
    for family, old, new in zip(after.families, before.values, after.values, strict=True):
        changed = {s: b for s, a, b in zip(family.slots, old, new, strict=True) if a != b}
        if changed:
            base = base.with_values(family.name, changed)
    return base


def units_of(program: Program, e: Exit) -> Sequence[nn.Module]:
    """What must be trained before an exit says anything: its head, its score, the router that sends rows there."""
    assert program.marked is not None
    branch: Any = program.marked.get_submodule(e.head)
    units = (branch.head,) if branch.score is None else (branch.head, branch.score)
    return (*units, program.marked.get_submodule(f"{ROUTES}.unit")) if e.criterion.routed else units
