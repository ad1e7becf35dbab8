"""The parts of the benchmark in order, what each is expected to take, and what is left out where time runs short.

A machine is lent for ten minutes a command: what matters most comes first, a part is not begun that the time left does not
hold, and figures are on the disk as soon as they are known.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tests.bench import machine, record
from tests.bench.gpu import cases, kernels, nodes, predictions, subjects
from tests.bench.gpu.cases import Found, Setting

RESERVE = 15.0  # seconds kept back for the table


@dataclass(frozen=True)
class Part:
    """One part.

    Attributes:
        seconds: What it should take on an H100, compiling included. Guessed, as nothing has run.
        quick: Whether `--quick` has it.
    """

    name: str
    about: str
    seconds: float
    quick: bool = True
    model: str | None = None
    batch: int = 0
    rival: str | None = None


PARTS: list[Part] = [
    Part("nodes", "cost of IF, SWITCH and WHILE nodes", 15),
    Part("kernels", "decide and head_confidence by themselves", 25),
    Part("bert-1", "early exits at batch 1, against rivals", 45, model="bert", batch=1),
    Part("bert-32", "the same at batch 32", 30, model="bert", batch=32),
    Part("bert-128", "the same at batch 128", 35, False, model="bert", batch=128),
    Part("bert-8", "the same at batch 8", 25, False, model="bert", batch=8),
    Part("vit-1", "early exits at batch 1, against rivals", 35, False, model="vit", batch=1),
    Part("vit-32", "the same at batch 32", 30, False, model="vit", batch=32),
    Part("resnet-1", "early exits at batch 1, against rivals", 45, False, model="resnet", batch=1),
    Part("resnet-32", "the same at batch 32", 40, False, model="resnet", batch=32),
    Part("cond-bert-1", "torch.cond by hand under torch.compile", 60, False, model="bert", batch=1, rival="cond"),
    Part("cond-bert-32", "torch.cond by hand under torch.compile", 60, False, model="bert", batch=32, rival="cond"),
    Part("tuned-bert-1", "torch.compile(mode='max-autotune')", 90, False, model="bert", batch=1, rival="tuned"),
    Part("tuned-bert-32", "torch.compile(mode='max-autotune')", 90, False, model="bert", batch=32, rival="tuned"),
    Part("tuned-vit-32", "torch.compile(mode='max-autotune')", 90, False, model="vit", batch=32, rival="tuned"),
    Part("tuned-resnet-32", "torch.compile(mode='max-autotune')", 150, False, model="resnet", batch=32, rival="tuned"),
]
BY_NAME = {part.name: part for part in PARTS}


@dataclass(frozen=True)
class Options:
    """What the command asks for.

    Attributes:
        seconds: After which nothing more is begun.
        small: Tiny models, for the test of the driver.
    """

    setting: Setting
    out: Any
    seconds: float = 560.0
    dtype: torch.dtype = torch.float16
    small: bool = False
    say: Callable[[str], None] = print


def chosen(only: Sequence[str] | None, quick: bool) -> list[Part]:
    return [p for p in PARTS if (p.name in only if only else p.quick or not quick)]


def run(parts: Sequence[Part], options: Options) -> list[str]:
    """Runs what there is time for; gives the names of what was left out."""
    began, left_out = time.perf_counter(), []
    expected = sum(p.seconds for p in parts)
    options.say(f"{len(parts)} parts, about {expected:.0f} s expected, {options.seconds:.0f} s allowed")

    @functools.cache
    def subject(name: str) -> subjects.Subject:
        made = subjects.BUILDERS[name](options.setting.platform.device, options.dtype, options.small)
        made.tell_apart()
        return made

    for part in parts:
        left = options.seconds - RESERVE - (time.perf_counter() - began)
        if part.seconds > left and not options.small:
            options.say(f"{part.name}: left out, {left:.0f} s are left and it takes about {part.seconds:.0f}")
            left_out.append(part.name)
            continue
        options.say(f"{part.name}: {part.about}, about {part.seconds:.0f} s ...")
        started = time.perf_counter()

        def save(found: Found, part: Part = part, started: float = started) -> None:
            record.merge(options.out, part.name, made(part, found, time.perf_counter() - started, options))

        found = Found(save)
        with found.trying(part.name):
            begin(part, subject, options, found)
        save(found)
        for problem in found.problems:
            options.say(f"  problem: {problem}")
        options.say(f"  {time.perf_counter() - started:.1f} s, {len(found.figures)} figures")
    return left_out


def begin(part: Part, subject: Callable[[str], subjects.Subject], options: Options, found: Found) -> None:
    if part.name == "nodes":
        nodes.run(options.setting, found, 4 if options.small else nodes.CHAIN)
    elif part.name == "kernels":
        kernels.run(options.setting, found, options.small)
    elif part.rival is None:
        assert part.model is not None
        cases.run(subject(part.model), part.batch, options.setting, found)
    else:
        assert part.model is not None
        cases.run_compiled(subject(part.model), part.batch, options.setting, found, part.rival == "cond")


def made(part: Part, found: Found, seconds: float, options: Options) -> dict[str, Any]:
    """The record of one part, in the form of the other benchmarks' with problems and predictions beside."""
    facts = machine.facts(options.setting.platform.device) | {"dtype": str(options.dtype).removeprefix("torch.")}
    said = {
        "command": f"python -m tests.bench.gpu --only {part.name}",
        "about": part.about,
        "date": time.strftime("%Y-%m-%d"),
        "seconds": round(seconds, 1),
        "machine": facts,
        "problems": found.problems,
        "figures": [predictions.beside(f.to_dict(), facts["device"]) for f in found.figures],
    }
    if part.name == "nodes":
        said["costs, us"] = {name: round(cost, 3) for name, cost in nodes.costs(found.figures).items()}
    return said
