"""Which rows are still in, and the results of those that left. Shared by every executor that compacts on the host."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Logits = Tensor | Callable[[Tensor | None], Tensor]
"""[n, ..., C], or what computes them for some of the n rows, given their positions `[m]` (None: all)."""


def taken(logits: Logits, at: Tensor | None) -> Tensor:
    """The logits at some positions, None for all."""
    if callable(logits) and not isinstance(logits, Tensor):
        return logits(at)
    return logits if at is None else logits.index_select(0, at)


class Survivors:
    """The state of one call.

    Args:
        size: Rows of the batch.
        end: Exit index of rows that no exit takes.
        dtype: Of the prediction that the call returns; heads may give another one under autocast.

    Attributes:
        rows: [n] int64, the batch's rows that are still in; None means all of them, in order.
        prediction: [B, ..., C]; rows that left are filled in. None until a row leaves or the end is reached.
    """

    def __init__(self, size: int, device: torch.device, end: int, dtype: torch.dtype) -> None:
        self.size, self.device, self.end, self.dtype = size, device, end, dtype
        self.rows: Tensor | None = None
        self.prediction: Tensor | None = None
        self.exit_index: Tensor | None = None
        self.confidence: Tensor | None = None
        self.final: Tensor | None = None  # [B] bool, only where a call was stopped

    def decide(self, exit_index: int, logits: Logits, confidence: Tensor, threshold: float) -> Tensor | None:
        """Lets the rows that are sure leave.

        Args:
            logits: [n, ..., C] of the rows that are still in, or what computes those of the rows that leave.
            confidence: [n]; NaN is never sure.

        Returns:
            None if no row leaves, else the positions `[m]` among the n rows of those that stay.
        """
        sure = confidence >= threshold
        stay = torch.nonzero(~sure).view(-1)
        left = stay.numel()
        if left == sure.numel():
            return None
        self._write(exit_index, logits, confidence, None if left == 0 else sure)
        self.rows = stay if self.rows is None else self.rows[stay]
        return stay

    def _write(self, exit_index: int, logits: Logits, confidence: Tensor, sure: Tensor | None) -> None:
        if sure is None and self.rows is None:  # every row at the first decision: nothing to gather
            self.prediction, self.confidence = taken(logits, None).to(self.dtype), confidence
            self.exit_index = torch.full((self.size,), exit_index, dtype=torch.int64, device=self.device)
            return
        rows, at, surest = self.rows, None, confidence
        if sure is not None:
            at = torch.nonzero(sure).view(-1)
            rows = at if self.rows is None else self.rows[at]
            surest = confidence.index_select(0, at)
        given = taken(logits, at).to(self.dtype)
        assert rows is not None
        if self.prediction is None:
            self.prediction = given.new_empty((self.size, *given.shape[1:]))
            # Rows that no exit takes end at the model's own end.
            self.exit_index = torch.full((self.size,), self.end, dtype=torch.int64, device=self.device)
            self.confidence = torch.zeros((self.size,), dtype=torch.float32, device=self.device)
        assert self.exit_index is not None and self.confidence is not None
        self.prediction = self.prediction.index_copy_(0, rows, given)
        self.exit_index.index_fill_(0, rows, exit_index)
        self.confidence.index_copy_(0, rows, surest.detach())

    def finish(self, prediction: Tensor, confidence: Tensor | None, at: int | None = None) -> None:
        """The end for the rows that are still in: prediction [n, ..., C], batch first.

        Args:
            at: The exit that a call was stopped at: these rows are not final. None for the model's own end.
        """
        if prediction.dtype != self.dtype:
            prediction = prediction.to(self.dtype)
        if at is not None:
            self.final = torch.zeros(self.size, dtype=torch.bool, device=self.device)
            if self.rows is not None:
                self.final = torch.ones_like(self.final).index_fill_(0, self.rows, False)
        if self.rows is None:
            self.prediction, self.confidence = prediction, confidence
            index = self.end if at is None else at
            self.exit_index = torch.full((self.size,), index, dtype=torch.int64, device=self.device)
            return
        assert self.prediction is not None and self.confidence is not None and self.exit_index is not None
        self.prediction = self.prediction.index_copy_(0, self.rows, prediction)
        if at is not None:
            self.exit_index.index_fill_(0, self.rows, at)
        if confidence is not None:
            self.confidence.index_copy_(0, self.rows, confidence.detach())

    def copy(self) -> Survivors:
        """The same state; what becomes of one does not touch the other."""
        new = Survivors(self.size, self.device, self.end, self.dtype)
        new.rows = self.rows
        for name in ("prediction", "exit_index", "confidence"):
            value = getattr(self, name)
            setattr(new, name, None if value is None else value.clone())
        return new

    def gather(self, tensor: Tensor, axis: int | None, stay: Tensor) -> Tensor:
        """The rows that stay of a live tensor."""
        return tensor if axis is None else tensor.index_select(axis, stay)
