"""Which output of a model holds the class scores."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from eecompile.errors import StrategyError, near
from eecompile.signature import Leaf

ONE_SCORE = "return one score a row as [B, 1]: scores.unsqueeze(-1), in a module around the model if need be"
LEAST_TO_TELL = 8  # scores between 0 and 1, by which a sigmoid is recognised


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
    named = [i for i, leaf in enumerate(leaves) if leaf.path.rsplit(".", 1)[-1] in ("logits", "logit")]
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
        hint=ONE_SCORE if not able and any(map(_one_score, leaves)) else "pass prediction= with its name or index",
    )


def check_scores(scores: Tensor, front_end: str, where: str | None = None) -> None:
    """Refuses probabilities of a model whose end was not recognised: rows that exit early would be given logits.

    Args:
        scores: What the model predicts for an example, [B, C] or [B, S, C].
        front_end: With "blocks", where the end is in no graph, 8 scores between 0 and 1 count as those of a sigmoid.

    Raises:
        StrategyError: They look like the output of a softmax, a log-softmax or a sigmoid.
    """
    z = scores.detach().float()
    if not z.numel() or not bool(z.isfinite().all()):
        return
    one = torch.ones(z.shape[:-1], device=z.device)
    several = z.shape[-1] > 1
    end = None
    if several and bool((z >= 0).all()) and torch.allclose(z.sum(-1), one, atol=1e-3):
        end = "softmax"
    elif several and bool((z <= 0).all()) and torch.allclose(z.exp().sum(-1), one, atol=1e-3):
        end = "log-softmax"
    elif front_end == "blocks" and z.numel() >= LEAST_TO_TELL and bool(((z > 0) & (z < 1)).all()):
        end = "sigmoid"
    if end is not None:
        raise StrategyError(
            "the prediction looks like probabilities, and rows that exit early would be given logits",
            where=where,
            got=f"what a {end} gives, by an end of the model that was not recognised (capture={front_end!r})",
            wanted="logits",
            hint='return the logits, or prediction= that names them; capture="export" follows an end that is softmax, '
            "log_softmax or sigmoid",
        )


def _one_score(leaf: Leaf) -> bool:
    return leaf.batch_axis is not None and leaf.dtype.is_floating_point and len(leaf.shape) == 1


def _checked(leaves: Sequence[Leaf], index: int, where: str | None) -> int:
    leaf = leaves[index]
    if leaf.batch_axis is None or not leaf.dtype.is_floating_point or len(leaf.shape) not in (2, 3):
        raise StrategyError(
            "the prediction must be class scores per row",
            where=where,
            got=leaf.describe(),
            wanted="floating point [B, C] or [B, S, C]",
            hint=ONE_SCORE if _one_score(leaf) else None,
        )
    if len(leaf.shape) == 3 and leaf.batch_axis != 0:
        raise StrategyError(
            "scores per position need the batch on axis 0", where=where, got=leaf.describe(), wanted="[B, S, C]"
        )
    return index
