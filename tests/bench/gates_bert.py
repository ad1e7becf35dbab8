"""Gated blocks of BERT-base: as `gates`, a linear gate on every block."""

from __future__ import annotations

from eecompile.strategies import SkipNet
from tests.bench import gates, models
from tests.bench.groups import Context
from tests.bench.record import Figure


def run(context: Context) -> list[Figure]:
    batch, length = (4, 8) if context.small else (32, 128)
    return gates.figures(models.bert(batch, length, SkipNet(unit="linear"), context.device), context)
