"""The exit mix of `saving` against early exits as people write them: row by row, and all together.

At two lengths: a matrix product over 128 tokens of one row keeps two cores nearly as busy as one over 32 rows, so the
longer the rows, the less there is to gain over batch 1. Half of the sentences of SST-2 are shorter than 20 words.
"""

from __future__ import annotations

import torch

from tests.bench import saving
from tests.bench.groups import Context
from tests.bench.record import Figure, Target, timed
from tests.bench.rivals import ByHand

LENGTHS = (128, 32)
ONE, ALL = "batch 1, Python if", "until all are sure"


def run(context: Context) -> list[Figure]:
    return [figure for length in LENGTHS for figure in at_length(16 if context.small else length, context)]


def at_length(length: int, context: Context) -> list[Figure]:
    made = saving.subject(context, length)
    hand = ByHand(made)
    with torch.no_grad():
        mine = made.compiled().logits
        for theirs in (hand.row_by_row(), hand.all_together()):
            torch.testing.assert_close(theirs, mine, atol=1e-3, rtol=1e-3)  # the same rows left at the same exits
    rounds = context.measure({"rewritten": made.compiled, ONE: hand.row_by_row, ALL: hand.all_together})
    one = timed(f"{made.name}, against {ONE}", rounds, "rewritten", ONE, Target(2.0, "at least"), inverse=True)
    every = timed(f"{made.name}, against waiting {ALL}", rounds, "rewritten", ALL, Target(1.3, "at least"), inverse=True)
    for figure in (one, every):
        figure.detail = {"leaving": saving.LEAVING, "length": length}
    if not one.met:
        one.cause = (
            f"The rival runs the same layers on the same rows, one row after the other; at {length} tokens a row that takes "
            f"only {one.value:.2f} times as long on {torch.get_num_threads()} threads, which is all that batching can give."
        )
    return [one, every]
