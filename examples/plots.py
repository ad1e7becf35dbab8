"""Plots of accuracy against cost on real data, beside choices that do not look at the rows and smaller models, as SVG."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Mapping
from typing import Any

from eecompile.report.figures import Place, new_axes, trade_off

LONGEST = 10  # letters of a name that is written into a plot


def panels(record: Mapping[str, Any], static: Iterable[Place]) -> list[dict[str, Any]]:
    """What `svg` draws for a record: rows with the same constant choices together; none where rows have no such choices.

    Args:
        static: Name, cost and accuracy of smaller models for the same data.
    """
    found: dict[str, dict[str, Any]] = {}
    for row in record["rows"]:
        if "constants" not in row:
            continue
        constants = [[name if len(name) <= LONGEST else "", cost, right] for name, cost, right in row["constants"]]
        panel = found.setdefault(json.dumps(constants), {"title": row["what"], "constants": constants, "chosen": []})
        panel["chosen"].append([row.get("thresholds", row["what"]), row["cost"], row["accuracy"]])
        curve = (row.get("evaluation") or {}).get("curve") or ()
        panel["curve"] = panel.get("curve") or [[point["cost"], point["accuracy"]] for point in curve]
        panel["static"] = [list(place) for place in static]
    return list(found.values())


def smaller_models(records: Iterable[Mapping[str, Any]]) -> dict[str, list[Place]]:
    """The models of each cascade but the last, by the name of the last one's trunk, which they are compared with."""
    found = {}
    for record in records:
        if "alone" in record:
            *_, last = record["models"].values()
            found[last["recipe"]["name"]] = [tuple(place) for place in record["alone"][:-1]]
    return found


def digest(drawn: list[dict[str, Any]]) -> str:
    """Names what a plot shows; it is written into the file, so that a plot of other figures is found out."""
    return hashlib.sha256(json.dumps(drawn).encode()).hexdigest()[:16]


def svg(drawn: list[dict[str, Any]]) -> str:
    """One SVG with a plot for each of `panels`."""
    import matplotlib

    figure, all_axes = new_axes(len(drawn))
    for axes, panel in zip(all_axes, drawn, strict=True):
        trade_off(axes, panel["constants"], panel["chosen"], curve=panel["curve"], static=panel["static"])
        axes.set_title(panel["title"], fontsize=9)
        axes.legend(fontsize=7, frameon=False, loc="lower right")
    made = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "eecompile"}):
        figure.savefig(made, format="svg", metadata={"Date": None, "Creator": None, "Description": digest(drawn)})
    return "\n".join(line.rstrip() for line in made.getvalue().splitlines()) + "\n"
