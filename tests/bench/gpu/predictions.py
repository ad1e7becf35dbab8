"""What was expected of each figure before anything ran: `../predictions.json`, put beside what was measured."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

FILE = Path(__file__).parents[1] / "predictions.json"
CARDS = ("H100", "H200")


@functools.cache
def known() -> dict[str, Any]:
    """Figure to {"H100": number, "H200": number, "why": text}."""
    found: dict[str, Any] = json.loads(FILE.read_text())["figures"]
    return found


def beside(figure: dict[str, Any], device: str) -> dict[str, Any]:
    """The record of a figure with what was expected of it; of an H100 on a card that nothing is said about."""
    said = known().get(figure["name"])
    card = next((c for c in CARDS if c in device), CARDS[0])
    return figure | {
        "predicted": None if said is None else said[card],
        "why predicted": None if said is None else said["why"],
    }
