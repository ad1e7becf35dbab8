"""What the tests of device programs call."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from tests.support import executor, random_thresholds
from tests.zoo import ZOO


def spread(fast, batch: int, seed: int = 0):
    """Inputs, with thresholds at which rows leave everywhere."""
    args, kwargs = ZOO["bert"].inputs(batch, seed=seed)
    confidences = fast.observe(*args, **kwargs).confidences[:-1]
    fast.set_thresholds(random_thresholds(confidences, random.Random(seed), closed=0.0))
    return kwargs


def reference(fast, **kwargs):
    with torch.no_grad(), executor(fast, "reference"):
        return fast.run(**kwargs)


def simulated(fast, **kwargs):
    with torch.no_grad(), executor(fast, "simulate"):
        return fast.run(**kwargs)


class Late:
    """A mailbox whose letters arrive `delay` looks after they were sent."""

    def __init__(self, delay: int) -> None:
        self.delay, self.sent, self.looks = delay, [], 0

    def post(self, number: Tensor) -> None:
        self.sent.append((self.looks + self.delay, int(number)))

    def newest(self) -> int | None:
        self.looks += 1
        there = [n for at, n in self.sent if at < self.looks]
        return there[-1] if there else None
