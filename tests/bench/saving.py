"""How much of what an exit mix could save is saved: 50/25/25 over three exits at batch 32.

The ideal is the model's own layers between the exits at the batch sizes that survive: no head, no decision, no copy.
"""

from __future__ import annotations

from eecompile.measuring import summary
from tests.bench import models
from tests.bench.groups import Context
from tests.bench.record import Figure, Target, timed, with_times
from tests.bench.rivals import BareStages

LEAVING = (16, 8, 8)
EXITS = ("bert.encoder.layer.2", "bert.encoder.layer.5", "bert.encoder.layer.8")


def subject(context: Context, length: int = 128) -> models.Subject:
    """BERT-base with its thresholds set for the mix; rows without padding."""
    made = models.bert(sum(LEAVING), 16 if context.small else length, EXITS, context.device)
    models.spread_out(made)
    models.force_mix(made, LEAVING)
    return made


def run(context: Context) -> list[Figure]:
    made = subject(context)
    sizes = [sum(LEAVING[k:]) for k in range(len(LEAVING) + 1)]
    ideal = BareStages(made, sizes)
    rounds = context.measure({"original": made.original, "rewritten": made.compiled, "bare stages": ideal})
    times = rounds.times
    saved = [(o - r) / (o - i) for o, r, i in zip(times["original"], times["rewritten"], times["bare stages"], strict=True)]
    value, spread = summary(saved)
    figure = Figure("realised saving", value, "of the ideal saving", spread, target=Target(0.95, "at least"))
    with_times(figure, rounds)
    cost = float(made.fast.run(**made.inputs).cost.mean())
    figure.detail = {"exits": EXITS, "leaving": LEAVING, "batch sizes": sizes, "cost in FLOPs": cost}
    whole = timed("ideal time over time", rounds, "rewritten", "bare stages", Target(0.95, "at least"), inverse=True)
    whole.unit = "of the ideal speed"
    speed = timed("against the original", rounds, "rewritten", "original", inverse=True)
    if not figure.met or not whole.met:
        figure.cause = whole.cause = "Heads, decisions and the copying of survivors are what is beyond the ideal."
    return [figure, whole, speed]
