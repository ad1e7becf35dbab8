"""The exit mix of `saving` against early exits as people write them: row by row, and all together."""

from __future__ import annotations

import torch

from tests.bench import saving
from tests.bench.groups import Context
from tests.bench.record import Figure, Target, timed
from tests.bench.rivals import ByHand


def run(context: Context) -> list[Figure]:
    made = saving.subject(context)
    hand = ByHand(made)
    with torch.no_grad():
        mine = made.compiled().logits
        for theirs in (hand.row_by_row(), hand.all_together()):
            torch.testing.assert_close(theirs, mine, atol=1e-4, rtol=1e-4)  # the same rows left at the same exits
    calls = {"rewritten": made.compiled, "batch 1, Python if": hand.row_by_row, "until all are sure": hand.all_together}
    rounds = context.measure(calls)
    return [
        timed(
            "against batch 1 with a Python if",
            rounds,
            "rewritten",
            "batch 1, Python if",
            Target(2.0, "at least"),
            inverse=True,
        ),
        timed(
            "against waiting for the whole batch",
            rounds,
            "rewritten",
            "until all are sure",
            Target(1.3, "at least"),
            inverse=True,
        ),
    ]
