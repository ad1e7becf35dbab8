"""`advise`: probes of every strategy that can be tried over the frozen model, timed together with the alternatives."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import median
from typing import Any

import torch
from torch import nn

from eecompile.advice.probe import Point, Probe, probe
from eecompile.advice.report import CASCADE, Advice, Option, decide
from eecompile.advice.rivals import AGAINST, Rival, accuracy, predicting, rivals, smaller
from eecompile.advice.sample import Clock, Sample, sample
from eecompile.calibration.collect import static_output
from eecompile.calibration.options import Options
from eecompile.capture.adapter import mode
from eecompile.errors import EecompileError, near, shown
from eecompile.measuring import Rounds, rounds_of
from eecompile.module import CompiledModule
from eecompile.plain import check_callable, check_number, plain
from eecompile.training.batches import Batch

DROPS = (0.01, 0.02)
PROBED = ("branchy", "mebert", "anytime", CASCADE)
NOT_PROBED = {
    "ann, skipnet, act, depth_adaptive, self_adaptive": "they train the model itself, and no probe can stand for that",
    "self_speculative": "for language models that generate",
}
RESERVE = 0.3  # of the budget, for rivals and timing
TIMED, ROUNDS = 4, 9  # batches of a timed call, and rounds
TIMING = 0.1  # share of the budget that timing has, whatever went before
BUSY = 0.1  # share of the machine taken by others above which that is said


def advise(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    minutes: float = 5,
    static: nn.Module | None = None,
    only: Sequence[str] | None = None,
    prediction: str | int | None = None,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> Advice:
    """Says whether early exit would pay for a model, before anything is trained.

    Heads are fitted over the frozen model on three batches of four of a sample; on the fourth ones the cheapest thresholds
    are chosen that lose at most 1 and 2 points, and everything is timed in turns on this machine. The model is not changed.

    Args:
        model: A trained model, in any mode; it is run in eval mode.
        loader: `(inputs, labels)` or Hugging Face batches, best of data that the model was not trained on. As much of it is
            used as the time allows, in its own batches: they are what is timed.
        minutes: Budget of time. Fitting heads ends when 55% of it is spent, the search for thresholds when 70% is; `notes`
            say what was cut short, and what no time is left for is skipped, and listed.
        static: A smaller model for the same task, to compare with and to begin a cascade with.
        only: What to try, of the strategies "branchy", "mebert", "anytime" and "cascade", and of "torch.compile", "int8" and
            "ONNX Runtime", where they work here; everything by default.
        prediction: Which output holds the class scores, where several could.
        seed: Of heads and intervals.
        progress: Called with the name of each step.

    Returns:
        Advice: `pays`, `strategy`, `why`, and what to do as `commands` and as `python`; printed, a table.

    Raises:
        EecompileError: No model, no labels, too few rows, or an option out of range.
    """
    minutes, seed = plain(minutes), plain(seed)
    check_callable("progress", progress, "(step's name) -> None")
    names = _checked(model, minutes, static, only, seed)
    clock, say = Clock(60 * minutes), progress or (lambda _: None)
    skipped = dict(NOT_PROBED)
    tried = [name for name in PROBED if name in names]
    if static is None and CASCADE in tried:
        tried.remove(CASCADE)
        skipped[CASCADE] = "it begins with a smaller model: static="
    with mode(model, False), mode(model if static is None else static, False), torch.random.fork_rng(devices=[]):
        say("read a sample")
        taken = sample(model, loader, clock, max(1, len(tried)))
        if static is not None:
            static_output(static, taken.val[0])
        options = {"prediction": prediction, "seed": seed}
        probes: list[Probe] = []
        longest = 0.0
        for name in tried:
            if probes and clock.left - longest < RESERVE * clock.seconds:
                skipped[name] = "no time is left"
                continue
            say(f"probe {name}")
            start = clock.spent
            models: Any = {"small": static, "large": model} if name == CASCADE else model
            try:
                probes.append(probe(name, models, taken, DROPS, options, clock))
            except EecompileError as error:
                skipped[name] = "; ".join(str(part) for part in (error.what, error.got) if part)
            longest = max(longest, clock.spent - start)
        return _advice(model, static, probes, taken, clock, skipped, names, say)


def _checked(model: Any, minutes: Any, static: Any, only: Any, seed: Any) -> tuple[str, ...]:
    """The names to try."""
    known = (*PROBED, *AGAINST)
    if isinstance(model, CompiledModule):
        raise EecompileError("this model is compiled already", hint="advice is for the original model")
    if not isinstance(model, nn.Module):
        raise EecompileError("advise() takes a module", got=type(model).__name__, wanted="torch.nn.Module")
    if static is not None and not isinstance(static, nn.Module):
        raise EecompileError("static= is a smaller model", got=type(static).__name__, wanted="torch.nn.Module")
    check_number("minutes", minutes, above=0)
    check_number("seed", seed, whole=True)
    if only is not None and not isinstance(only, list | tuple | set):
        raise EecompileError("only= is a list of names", got=shown(only), wanted=f"({shown(only)},)")
    names = known if only is None else tuple(only)
    for name in names:
        if name not in known:
            raise EecompileError(
                "advice does not know this name", where="only=", got=repr(name), wanted=near(str(name), known)
            )
    return names


def _advice(
    model: nn.Module,
    static: nn.Module | None,
    probes: list[Probe],
    taken: Sample,
    clock: Clock,
    skipped: dict[str, str],
    names: tuple[str, ...],
    say: Callable[[str], None],
) -> Advice:
    if not probes:
        reasons = "; ".join(f"{name}: {why}" for name, why in skipped.items() if name in PROBED)
        raise EecompileError("no strategy could be tried on this model", got=reasons or "no strategy was asked for")
    fast = probes[0].fast
    say("measure what else there is")
    with rivals(model, fast, taken.val, names, clock, skipped.__setitem__) as others:
        if static is not None:
            others.append(smaller(model, static, taken.val, fast.prediction_of))
        options, calls = _options(probes, others)
        say("time")
        times = _timed({"model": lambda b: model(*b.args, **b.kwargs), **calls}, taken, clock)
    for i, option in enumerate(options):
        option.time, option.spread = times.ratio(str(i), "model")
    best, most, why = decide(options, DROPS)
    needed = Options(max_drop=most).rows_needed
    notes = [f"Cut short for {p.name}: {'; '.join(p.cut)}; more minutes may show more." for p in probes if p.cut]
    notes.append(f"A guarantee at {most:.0%} takes at least {needed} rows of calibration, and more careful thresholds.")
    return Advice(
        pays=best is not None,
        strategy=None if best is None else best.name,
        max_drop=most,
        why=[*why, *_doubts(times)],
        options=options,
        skipped=skipped,
        rows=taken.rows,
        batch=taken.batch,
        accuracy=accuracy(predicting(model, fast.prediction_of), taken.val),
        seconds=clock.spent,
        by_name=isinstance(taken.fit[0][0], dict),
        notes=notes,
    )


def _doubts(times: Rounds) -> list[str]:
    """Why times mean little; empty where they were measured on an idle machine."""
    share = median([share for share in times.others if share is not None] or [0.0])
    text = f"Other processes took {share:.0%} of the machine, so times mean little: measure again on an idle one."
    return [text] if share > BUSY else []


def _options(probes: list[Probe], others: list[Rival]) -> tuple[list[Option], dict[str, Callable[[Batch], Any]]]:
    """Everything to compare, and how to run the i-th, named by its index."""
    found: list[Option] = []
    calls: dict[str, Callable[[Batch], Any]] = {}

    def add(option: Option, call: Callable[[Batch], Any]) -> None:
        calls[str(len(found))] = call
        found.append(option)

    for i, most in enumerate(DROPS):
        for p in probes:
            add(_option(p.name, "strategy", p.points[i]), _call(p, p.points[i]))
        p = min(probes, key=lambda p: (p.constant[i].drop > most, p.constant[i].cost))
        where = ", ".join(p.constant[i].exits) or "model"
        add(_option(f"one exit for all rows ({p.name}, {where})", "constant", p.constant[i]), _call(p, p.constant[i]))
    for r in others:
        add(Option(r.name, "rival", None, r.cost, r.cost, r.cost, r.drop), r.call)
    return found, calls


def _option(name: str, kind: str, p: Point) -> Option:
    return Option(name, kind, p.max_drop, p.cost, p.low, p.high, p.drop, exits=p.exits)


def _call(p: Probe, point: Point) -> Callable[[Batch], Any]:
    def run(b: Batch) -> Any:
        if p.fast.settings is not point.settings:
            p.fast.settings = point.settings
        return p.fast(*b.args, **b.kwargs)

    return run


def _timed(calls: dict[str, Callable[[Batch], Any]], taken: Sample, clock: Clock) -> Rounds:
    """All calls in turns on the same batches, in as many rounds as the time allows, `LEAST` at least."""
    one, seconds = taken.seconds * len(calls), max(clock.left, TIMING * clock.seconds)
    count = max(1, min(TIMED, len(taken.val), int(seconds / (one * (ROUNDS + 2)))))
    val = taken.val[:count]

    def over(call: Callable[[Batch], Any]) -> Callable[[], None]:
        def run() -> None:
            for batch in val:
                call(batch)

        return run

    with torch.no_grad():
        return rounds_of(
            {name: over(call) for name, call in calls.items()}, ROUNDS, warm_up=1, quiet_below=BUSY, seconds=seconds
        )
