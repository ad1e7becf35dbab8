"""All exits closed: what is left of the rewriting costs next to nothing."""

from __future__ import annotations

import torch

from tests.bench import machine, models
from tests.bench.groups import Context
from tests.bench.models import Subject
from tests.bench.record import Figure, Target, timed

AT_MOST = Target(1.02)


def run(context: Context) -> list[Figure]:
    device = context.device
    subjects = [models.lenet(1, 2, device)]
    if not context.small:
        subjects += [models.resnet(64, 4, device), models.bert(8, 128, 4, device, padded=True)]
    return [closed(subject, context) for subject in subjects]


def closed(subject: Subject, context: Context) -> Figure:
    fast = subject.fast
    fast.set_thresholds(models.CLOSED)
    with torch.no_grad():
        want, got = subject.original(), subject.compiled()
    same = torch.equal(fast.prediction_of(got), fast.prediction_of(want))
    calls = {"original": subject.original, "exits closed": subject.compiled}
    rounds = context.measure(calls | {"checks of a call": lambda: fast.flatten((), subject.inputs)})
    figure = timed(subject.name, rounds, "exits closed", "original", AT_MOST)
    figure.detail = {"exits": [e.cut for e in fast.exits], "bit for bit the original's output": same}
    with_faults(figure, subject, context)
    if not figure.met:
        checks, original = (figure.medians_ms[name] for name in ("checks of a call", "original"))
        figure.cause = (
            f"Checks of a call's arguments and of the user's model take {1e3 * checks:.0f} us, {checks / original:.1%} of "
            f"the original's time; page faults a call: {figure.detail.get('page faults a call')}."
        )
    return figure


def with_faults(figure: Figure, subject: Subject, context: Context) -> None:
    """Pages that each call takes from the system: on the CPU, where a ratio of times often comes from."""
    if context.device.type != "cpu" or context.small:
        return
    with torch.no_grad():
        figure.detail["page faults a call"] = {
            "original": machine.page_faults(subject.original),
            "rewritten": machine.page_faults(subject.compiled),
        }
