"""Early exits as people write them by hand, on the same model and the same heads, built as well as their idea allows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eecompile.kernels.confidence import confidence as confidence_of
from tests.bench.models import Subject


class ByHand:
    """BERT's own modules, layer after layer, with a head and a Python `if` after some of them.

    The rows have no padding, so there is no mask to make. Heads, temperatures and thresholds are those of the compiled
    model; criterion by the same function.
    """

    def __init__(self, subject: Subject) -> None:
        fast, model = subject.fast, subject.model
        assert set(subject.inputs) == {"input_ids"}
        self.ids = subject.inputs["input_ids"]
        self.embeddings: Any = model.bert.embeddings
        self.layers: Any = model.bert.encoder.layer
        self.pooler: Any = model.bert.pooler
        self.classifier: Any = model.classifier
        depths = [int(e.cut.rpartition(".")[2]) for e in fast.exits]
        self.branches = {d: fast.branch(e.name) for d, e in zip(depths, fast.exits, strict=True)}
        self.thresholds = {d: e.threshold for d, e in zip(depths, fast.exits, strict=True)}
        self.temperatures = dict(zip(depths, fast.temperatures, strict=False))
        self.criterion = fast.exits[0].criterion.name

    def end(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.pooler(hidden))
        return logits

    def scored(self, depth: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.branches[depth](hidden)
        found, _ = confidence_of(logits, None, self.criterion, self.temperatures[depth])
        return logits, found

    def row_by_row(self) -> Tensor:
        """Batch 1: each row stops by itself, in plain Python."""
        return torch.cat([self._one(self.ids[i : i + 1]) for i in range(len(self.ids))])

    def _one(self, ids: Tensor) -> Tensor:
        hidden = self.embeddings(input_ids=ids)
        for depth, layer in enumerate(self.layers):
            hidden = layer(hidden)
            if depth in self.branches:
                logits, confidence = self.scored(depth, hidden)
                if confidence.item() >= self.thresholds[depth]:
                    return logits
        return self.end(hidden)

    def all_together(self) -> Tensor:
        """The whole batch goes on until its last row is sure; each row keeps the answer it was first sure of."""
        hidden = self.embeddings(input_ids=self.ids)
        answers: Tensor | None = None
        sure = torch.zeros(len(self.ids), dtype=torch.bool, device=self.ids.device)
        for depth, layer in enumerate(self.layers):
            hidden = layer(hidden)
            if depth in self.branches:
                logits, confidence = self.scored(depth, hidden)
                new = (confidence >= self.thresholds[depth]) & ~sure
                answers = logits if answers is None else torch.where(new[:, None], logits, answers)
                sure = sure | new
                if bool(sure.all()):
                    return answers
        logits = self.end(hidden)
        return logits if answers is None else torch.where(sure[:, None], answers, logits)


class BareStages:
    """The ideal: the model's layers between the exits at the batch sizes that survive; no head, no decision, no copy."""

    def __init__(self, subject: Subject, sizes: list[int]) -> None:
        by_hand = ByHand(subject)
        model: Any = subject.model
        depths = sorted(by_hand.branches)
        bounds = [0, *(d + 1 for d in depths), len(by_hand.layers)]
        self.embeddings, self.end, self.ids = by_hand.embeddings, by_hand.end, by_hand.ids[: sizes[0]]
        self.parts = [list(by_hand.layers[a:b]) for a, b in zip(bounds, bounds[1:], strict=False)]
        self.sizes = sizes
        with torch.no_grad():
            some = model.bert.embeddings(input_ids=by_hand.ids)
        # What a stage is given; where the numbers come from does not change the time.
        self.inputs = [some[:n].clone() for n in sizes]

    def __call__(self) -> Tensor:
        hidden = self.embeddings(input_ids=self.ids)
        for k, (size, part) in enumerate(zip(self.sizes, self.parts, strict=False)):
            if size == 0:
                return hidden
            if k > 0 and size != self.sizes[k - 1]:
                hidden = self.inputs[k]
            for layer in part:
                hidden = layer(hidden)
        return self.end(hidden)
