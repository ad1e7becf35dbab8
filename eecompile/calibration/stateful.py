"""Patience for any set of open exits, from predictions alone: the definition of the kernel, applied again."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from eecompile.criteria import Criterion
from eecompile.kernels.confidence import confidence


def agreement_confidences(
    predictions: Tensor, confidences: Tensor, criteria: Sequence[Criterion]
) -> Callable[[tuple[bool, ...]], Tensor]:
    """Open pattern to confidences float32 `[n, E]`.

    Patience depends only on which exits predict the same class, so the logits are replaced by one-hot rows
    over the exits: that of the first exit with the same prediction. Exits of other criteria keep their
    confidence.

    Args:
        predictions: int64 `[n, E]`, the class that each exit predicts.
        confidences: float32 `[n, E]` with all exits open; not finite where the logits could not be read.
    """
    e = predictions.shape[1]
    first = (predictions[:, :, None] == predictions[:, None, :]).to(torch.uint8).argmax(2)
    logits = torch.nn.functional.one_hot(first, max(e, 2)).float()
    logits[~confidences.isfinite()] = float("nan")
    one = torch.ones(())

    def compute(is_open: tuple[bool, ...]) -> Tensor:
        found, state = confidences.clone(), None
        for k, criterion in enumerate(criteria):
            if criterion.stateful:
                threshold = torch.tensor(0.0 if is_open[k] else 2.0)
                found[:, k], state = confidence(
                    logits[:, k], state, criterion.name, one, patience=criterion.patience, threshold=threshold
                )
        return found

    return compute


def all_or_none(confidences: Tensor) -> Callable[[tuple[bool, ...]], Tensor]:
    """For stateful criteria whose confidences cannot be computed again: other patterns never leave."""
    return lambda is_open: confidences if all(is_open) else torch.full_like(confidences, -1.0)
