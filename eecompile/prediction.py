"""Which output of a model holds the class scores."""

from __future__ import annotations

from collections.abc import Sequence

from eecompile.errors import StrategyError, near
from eecompile.signature import Leaf


def find_prediction(leaves: Sequence[Leaf], wanted: str | int | None, where: str | None = None) -> int:
    """Index of the output leaf that holds the class scores.

    Raises:
        StrategyError: It is not there, or several could be it; the message lists the outputs.
    """
    listed = "; ".join(f"{i}: {leaf.describe()}" for i, leaf in enumerate(leaves))
    if wanted is not None:
        for i, leaf in enumerate(leaves):
            if wanted in (i, leaf.path):
                return _checked(leaves, i, where)
        raise StrategyError(
            "prediction= names no output of the model",
            where=where,
            got=repr(wanted),
            wanted=listed,
            hint=near(str(wanted), [leaf.path for leaf in leaves]),
        )
    named = [i for i, leaf in enumerate(leaves) if leaf.path.rsplit(".", 1)[-1] == "logits"]
    if len(named) == 1:
        return _checked(leaves, named[0], where)
    able = [
        i
        for i, leaf in enumerate(leaves)
        if leaf.batch_axis is not None and leaf.dtype.is_floating_point and len(leaf.shape) in (2, 3)
    ]
    if len(able) == 1:
        return _checked(leaves, able[0], where)
    raise StrategyError(
        "no output looks like class scores" if not able else "several outputs could be the prediction",
        where=where,
        got=listed,
        wanted="one floating-point output [B, C] or [B, S, C]",
        hint="pass prediction= with its name or index",
    )


def _checked(leaves: Sequence[Leaf], index: int, where: str | None) -> int:
    leaf = leaves[index]
    if leaf.batch_axis is None or not leaf.dtype.is_floating_point or len(leaf.shape) not in (2, 3):
        raise StrategyError(
            "the prediction must be class scores per row",
            where=where,
            got=leaf.describe(),
            wanted="floating point [B, C] or [B, S, C]",
        )
    if len(leaf.shape) == 3 and leaf.batch_axis != 0:
        raise StrategyError(
            "scores per position need the batch on axis 0", where=where, got=leaf.describe(), wanted="[B, S, C]"
        )
    return index
