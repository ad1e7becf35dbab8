"""Whole models: the device executor against its rivals, at one batch size, for every exit mix.

Each rival's answers are compared with the `reference` executor at the same thresholds before it is timed. One that differs,
or that cannot be built, is a problem that the record says, and not a figure.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from eecompile.errors import EecompileError
from eecompile.measuring import Rounds
from eecompile.runtime.device.executor import Options
from tests.bench.gpu import mixes, rivals
from tests.bench.gpu.platform import Call, Platform
from tests.bench.gpu.subjects import EXITS, Subject
from tests.bench.record import Figure, Target, timed

DEVICE, MACHINE, ORIGINAL, IDEAL = "device", "device, as a state machine", "original, one graph", "ideal"
EAGER, GRAPHS = "host branch", "host branch, graphs"
ROWS, WAITING = "host branch, rows taken out", "waiting, graphs"
ALONE, IDEAL_ALONE = "device, replay alone", "ideal, replay alone"
ONE = 4  # calls of one row each, at batch 1
FAILURES = (
    RuntimeError,
    ValueError,
    LookupError,
    ArithmeticError,
    AttributeError,
    AssertionError,
    TypeError,
    EecompileError,
)


@dataclass
class Found:
    """Figures, and what went wrong, as they come in."""

    save: Callable[[Found], None] = lambda found: None
    figures: list[Figure] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def add(self, *figures: Figure) -> None:
        self.figures.extend(figures)
        self.save(self)

    @contextlib.contextmanager
    def trying(self, what: str) -> Iterator[None]:
        """What fails inside is noted, and the rest goes on."""
        try:
            yield
        except FAILURES as error:
            self.problems.append(f"{what}: {type(error).__name__}: {str(error).strip()[:600]}")
            self.save(self)


@dataclass(frozen=True)
class Setting:
    """How to measure.

    Attributes:
        check: Tolerance of answers, relative to the largest.
    """

    platform: Platform
    rounds: int = 9
    check: float = 2e-2


class Case:
    """A mix at a batch size: the calls, their thresholds, and their true answers."""

    def __init__(self, subject: Subject, batch: int, mix: str, confidences: Sequence[Tensor]) -> None:
        n = ONE if batch == 1 else batch
        self.subject, self.batch, self.mix = subject, batch, mix
        self.name = f"{subject.name}, batch {batch}, {mix}"
        self.chosen = mixes.choose(confidences, mixes.leaving(mix, n, EXITS), n)
        x = subject.pool[self.chosen.rows.to(subject.pool.device)]
        self.inputs = [t.contiguous() for t in x.split(batch)]
        self.exits = list(self.chosen.exits.split(batch))
        subject.fast.set_thresholds(self.chosen.thresholds)
        subject.fast.executor = "reference"
        self.check_exits()
        results = [subject.fast.run(**{subject.given: x}) for x in self.inputs]
        self.answers = [subject.fast.prediction_of(r.output) for r in results]
        self.full = [subject.logits(x) for x in self.inputs]

    def device(self, name: str) -> rivals.Logits:
        fast, given = self.subject.fast, self.subject.given
        fast.executor = name
        return lambda x: fast.prediction_of(fast(**{given: x}))

    def check_exits(self) -> None:
        """By the executor that is set now.

        Raises:
            ValueError: A row leaves elsewhere than it was chosen for.
        """
        fast = self.subject.fast
        found = torch.cat([fast.run(**{self.subject.given: x}).exit_index for x in self.inputs]).cpu()
        if not torch.equal(found, self.chosen.exits):
            raise ValueError(f"{fast.executor} leaves at {found.tolist()}, chosen were {self.chosen.exits.tolist()}")

    def replays(self, platform: Platform) -> Call:
        """The device program alone, once for each row that is a call; thresholds as they are set now."""
        return platform.replay_of(self.subject.fast, {self.subject.given: self.inputs[0]})


def same(got: Sequence[Tensor], want: Sequence[Tensor], tolerance: float) -> None:
    """Raises AssertionError where answers differ by more than `tolerance` of the largest."""
    for a, b in zip(got, want, strict=True):
        off, most = float((a.double() - b.double()).abs().max()), float(b.double().abs().max())
        assert a.shape == b.shape, f"{list(a.shape)} and {list(b.shape)}"
        assert off <= tolerance * (1 + most), f"answers differ by {off:.3g}, of {most:.3g} at most"


def confidences(subject: Subject) -> list[Tensor]:
    """Of the whole pool at every exit, float32 `[P]` on the CPU."""
    found = [subject.fast.observe(**{subject.given: x}).confidences for x in subject.pool.split(64)]
    return [torch.cat([f[k] for f in found if f is not None]).cpu() for k in range(EXITS)]


class Line:
    """The rivals of one case that agree with the reference, ready to be timed."""

    def __init__(self, case: Case, setting: Setting, found: Found) -> None:
        self.case, self.setting, self.found = case, setting, found
        self.calls: dict[str, Call] = {}

    def enter(self, name: str, build: Callable[[], rivals.Logits | Sequence[rivals.Logits]], full: bool = False) -> None:
        """Builds a rival, or one for each call, and lets it in where its answers are right.

        Args:
            full: Its answers are those of the original.
        """
        case = self.case
        with self.found.trying(f"{case.name}: {name}"):
            built = build()
            functions = [built] * len(case.inputs) if callable(built) else list(built)
            pairs = list(zip(functions, case.inputs, strict=True))
            for _ in range(2):  # and again, on memory that was used before
                got = [f(x) for f, x in pairs]
            same(got, case.full if full else case.answers, self.setting.check)
            self.calls[name] = lambda: [f(x) for f, x in pairs]

    def times(self) -> Rounds:
        """Seconds for each call of the model."""
        made = self.setting.platform.measure(self.calls, self.setting.rounds)
        made.times = {name: [t / len(self.case.inputs) for t in times] for name, times in made.times.items()}
        return made


def run(subject: Subject, batch: int, setting: Setting, found: Found) -> None:
    """All mixes at one batch size."""
    platform = setting.platform
    known = confidences(subject)
    for mix in mixes.MIXES:
        with found.trying(f"{subject.name}, batch {batch}, {mix}"), torch.no_grad():
            case = Case(subject, batch, mix, known)
            line = enter(case, setting, found)
            figures(case, line.times(), found)
            alone(case, platform, setting, found)
    with found.trying(f"{subject.name}, batch {batch}, state machine"), torch.no_grad():
        state_machine(Case(subject, batch, mixes.MIXES[1], known), setting, found)


def enter(case: Case, setting: Setting, found: Found) -> Line:
    platform, subject, thresholds = setting.platform, case.subject, case.chosen.thresholds
    line, x, batch = Line(case, setting, found), case.inputs[0], case.batch
    line.enter(DEVICE, lambda: case.device(platform.executor))
    case.check_exits()
    line.enter(ORIGINAL, lambda: rivals.graphed(platform, subject.logits, x), full=True)
    if ORIGINAL not in line.calls:  # whose forward may ask the host something; its pieces, one after the other, do not
        line.enter(ORIGINAL, lambda: rivals.cut_at(platform, subject, EXITS, x), full=True)
    if case.mix == mixes.MIXES[0]:
        return line
    hand = rivals.HostBranch(subject, thresholds)
    if batch == 1:
        at = {e: rivals.cut_at(platform, subject, e, x) for e in sorted({int(e) for e in case.chosen.exits})}
        line.enter(IDEAL, lambda: [at[int(e)] for e in case.chosen.exits])
        line.enter(EAGER, lambda: hand.one)
        line.enter(GRAPHS, lambda: rivals.GraphedBranch(platform, subject, thresholds, x))
    else:
        line.enter(IDEAL, lambda: rivals.BareStages(platform, subject, case.exits[0], x))
        line.enter(ROWS, lambda: hand.survivors)
        line.enter(WAITING, lambda: rivals.GraphedBranch(platform, subject, thresholds, x))
    return line


def figures(case: Case, rounds: Rounds, found: Found) -> None:
    """Ratios, with their targets."""
    middle, large = case.mix == mixes.MIXES[1], case.batch >= 32

    def add(what: str, name: str, target: float | None = None, *, faster: bool = True) -> None:
        if DEVICE in rounds.times and name in rounds.times:
            aim = None if target is None else Target(target, "at least" if faster else "at most")
            made = timed(f"{case.name}: {what}", rounds, DEVICE, name, aim, inverse=faster)
            made.detail = {"thresholds": case.chosen.thresholds, "margin": case.chosen.margin}
            made.detail["leaving"] = [int((case.chosen.exits == k).sum()) for k in range(EXITS + 1)]
            found.add(made)

    if case.mix == mixes.MIXES[0]:
        add("over the original, one graph", ORIGINAL, 1.03 if case.batch == 1 else None, faster=False)
        return
    add("of the ideal", IDEAL, 0.9 if case.batch == 1 else 0.85 if middle and large else None)
    add("against the original, one graph", ORIGINAL)
    add("against the host branch", EAGER, 2.5)
    add("against the host branch of graphs", GRAPHS)
    add("against the host branch, rows taken out", ROWS)
    add("against waiting for all", WAITING, 1.4 if middle and large else None)


def alone(case: Case, platform: Platform, setting: Setting, found: Found) -> None:
    """How much of a call is the program itself: the rest is copying in and out, and the host."""
    call = case.device(platform.executor)
    calls: dict[str, Call] = {DEVICE: lambda: call(case.inputs[0]), ALONE: case.replays(platform)}
    rounds = platform.measure(calls, setting.rounds)
    found.add(timed(f"{case.name}: a call over its replay", rounds, DEVICE, ALONE))


def state_machine(case: Case, setting: Setting, found: Found) -> None:
    """The two structures of a device program in turns."""
    fast, given = case.subject.fast, case.subject.given
    line = Line(case, setting, found)
    call = case.device(setting.platform.executor)
    line.enter(DEVICE, lambda: call)
    nested = [setting.platform.replay_of(fast, {given: x}) for x in case.inputs[:1]]
    before = fast.device_options
    fast.device_options = Options(structure="machine")
    try:
        line.enter(MACHINE, lambda: call)
        replay = setting.platform.replay_of(fast, {given: case.inputs[0]})
        rounds = setting.platform.measure({DEVICE: nested[0], MACHINE: replay}, setting.rounds)
        found.add(timed(f"{case.name}: state machine over nested", rounds, MACHINE, DEVICE))
    finally:
        fast.device_options = before
