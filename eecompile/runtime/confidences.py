"""Confidences of stored predictions, under other temperatures than they were made with."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from eecompile.criteria import Criterion
from eecompile.kernels.confidence import confidence, yes_or_no


def confidences_of(
    criterion: Criterion,
    surest: bool,
    outputs: Sequence[Tensor],
    temperatures: Tensor,
    scores: Sequence[Tensor] | None = None,
) -> tuple[Tensor, ...]:
    """Confidences `[n]` float32 of stored predictions of every exit and the model, all exits open; NaN where none is known.

    Args:
        surest: Whether the surest exit so far answers; `outputs` are then those of the heads by themselves.
        outputs: [n, C] or [n, S, C] each.
        temperatures: [E + 1].
        scores: [n] of each exit, for learned criteria and routers.
    """
    found: list[Tensor] = []
    state = None
    for k, logits in enumerate(outputs):
        last = k == len(outputs) - 1
        kind = criterion.at_end if last else criterion
        if kind.routed:  # a router's probability has nothing to do with the exit's output
            assert scores is not None
            found.append(scores[k])
            continue
        scored = scores[k].unsqueeze(-1) if scores is not None and kind.learned else yes_or_no(logits, kind.multi_label)
        value, state = confidence(
            scored,
            state if kind.stateful else None,
            kind.name,
            temperatures[k],
            patience=kind.patience,
            reduce=kind.reduce,
        )
        found.append(value.fmax(found[-1]) if surest and found and not last else value)
    return tuple(found)
