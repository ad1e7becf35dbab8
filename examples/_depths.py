"""What a depth-adaptive program says at every depth, kept: thresholds are chosen and evaluated without running it again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from eecompile.calibration.risk import SLACK, PlannedTest
from eecompile.training.batches import split
from examples._registry import DatasetError, atomic
from examples.trunks import console


@dataclass(frozen=True)
class Depths:
    """Rows of a data set with every gate open.

    Attributes:
        outputs: float32 [N, G + 1, C]: logits with the first n of G gated blocks run.
        scores: float32 [N, G]: of the gates.
        labels: int64 [N].
    """

    outputs: Tensor
    scores: Tensor
    labels: Tensor

    def right(self) -> Tensor:
        """[N, G + 1] bool: whether each depth answers right."""
        return self.outputs.argmax(-1) == self.labels.unsqueeze(1)

    def depth_at(self, threshold: float) -> Tensor:
        """[N] int64: blocks that each row runs where every gate has this threshold."""
        return (~(self.scores < threshold)).long().cumprod(1).sum(1)

    def accuracy_at(self, depth: Tensor) -> float:
        """Share of right answers where each row runs to its depth [N]."""
        return float(self.right().gather(1, depth.unsqueeze(1)).float().mean())

    def guaranteed(self, allowed: float, delta: float, thresholds: Sequence[float]) -> float:
        """The last of ascending thresholds that loses at most `allowed` with probability `1 - delta`; 0 where none does.

        Tested in order up to the first that cannot be shown (fixed-sequence testing of Learn then Test, Angelopoulos et al.
        2021), so the level is not divided.
        """
        full, found, test = self.right()[:, -1].double(), 0.0, PlannedTest(None, 0.0, SLACK * delta)
        for threshold in thresholds:
            right = self.right().gather(1, self.depth_at(threshold).unsqueeze(1)).squeeze(1)
            if test.p_value(full - right.double(), allowed) > delta:
                break
            found = threshold
        return found

    def cheapest(self, allowed: float, thresholds: Sequence[float]) -> float:
        """The threshold of the least mean depth whose accuracy is at most `allowed` below that of all blocks."""
        full = float(self.right()[:, -1].float().mean())
        found = [(float(d.float().mean()), t) for t in thresholds
                 if self.accuracy_at(d := self.depth_at(t)) >= full - allowed]  # fmt: skip
        return min(found)[1]


def depths(fast: Any, loader: Iterable[Any], path: Path) -> Depths:
    """One pass of ``fast.observe`` with every gate open, kept at ``path``; read from there the next time.

    Raises:
        DatasetError: The kept file is damaged.
    """
    if not path.exists():
        parts: dict[str, list[Tensor]] = {"outputs": [], "scores": [], "labels": []}
        before = fast.gate_thresholds.tolist()
        fast.set_gate_thresholds(0.0)
        for number, item in enumerate(track(loader, path.stem, console=console, disable=not console.is_terminal)):
            batch = split(item, number)
            result = fast.observe(*batch.args, **batch.kwargs)
            parts["outputs"].append(torch.stack([o.float() for o in result.outputs], 1))
            parts["scores"].append(result.trace.gate_scores.float())
            parts["labels"].append(batch.labels)
        fast.set_gate_thresholds(before)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(path) as written:
            save_file({key: torch.cat(part).contiguous() for key, part in parts.items()}, written)
    try:
        return Depths(**load_file(path))
    except (SafetensorError, TypeError) as error:
        raise DatasetError(f"{path} is damaged ({error}). Delete it and run again.") from error
