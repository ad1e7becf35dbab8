"""Advice before training: whether early exit would pay for a model, on this data and this machine."""

from __future__ import annotations

from eecompile.advice.measure import advise
from eecompile.advice.report import Advice

__all__ = ["Advice", "advise"]
