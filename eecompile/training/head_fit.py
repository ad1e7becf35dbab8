"""One head fitted to convergence on kept features: which kind, and how much weight decay, is chosen on rows held out.

One linear layer is a convex problem: features are standardised, L-BFGS minimises the objective plus
`weight_decay / 2 * ||W||^2`, and the scaling is folded into the layer. Heads with more layers are trained by AdamW on
shuffled mini-batches until rows held out gain no more. Shapes: n rows, D features, C classes.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eecompile.errors import EecompileError
from eecompile.heads import Head, LinearHead
from eecompile.training.batches import move
from eecompile.training.features import Block, Features, Slot, labels_at
from eecompile.training.objectives import Objective

DECAYS = (0.1, 0.03, 0.01, 0.003, 0.001, 0.0001)  # of linear heads, the largest first: each starts from the one before
LAYERS_DECAYS = (0.01, 0.3)  # of AdamW
DECAY = 0.01  # where there is nothing to choose on
LARGEST = 5e8  # multiplications of one evaluation, above which a linear head too is trained on mini-batches
ROWS = 64  # of a mini-batch
STEPS, PASSES = 1000, 10  # of AdamW at most: so many steps, or passes over the rows where those are more
ROUND, PATIENCE, BETTER = 20, 5, 0.01  # steps between two looks at the rows held out, looks without 1% less loss
UNWATCHED = 200  # steps where no rows are held out


@dataclass
class Fitted:
    """A head after fitting.

    Attributes:
        loss: Mean objective on the rows held out, on the rows fitted to where none are; infinite before.
        steps: Steps of the optimizer.
    """

    head: nn.Module
    weight_decay: float
    loss: float = math.inf
    steps: int = 0


class HeadFit:
    """Fits heads of one exit.

    Args:
        weight_decay: The caller's; None to choose it.
        lr: Of AdamW.
        until: By `time.perf_counter`; what has been found by then is taken, and `cut` is set.
    """

    def __init__(
        self,
        features: Features,
        slot: Slot,
        objective: Objective,
        convex: bool,
        weight_decay: float | None,
        lr: float,
        until: float = math.inf,
    ) -> None:
        self.features, self.slot, self.objective, self.convex = features, slot, objective, convex
        self.weight_decay, self.lr, self.until, self.cut = weight_decay, lr, until, False
        self.device = next((p.device for p in slot.branch.parameters()), torch.device("cpu"))
        self.chooses = features.held_rows > 0

    # ------------------------------------------------------------------ one kind of head

    def fit(self, head: nn.Module, seed: int) -> Fitted:
        """The head fitted under the best weight decay. A copy: the one given is as before. The model's layers stay."""
        if head is self.slot.tail:
            return Fitted(head, 0.0, self.loss(head, self.chooses))
        if isinstance(head, LinearHead) and self._convex(head):
            return self._linear(head)
        decays = self._decays((DECAY,) if self._read(head) == "all" else LAYERS_DECAYS)
        found: list[Fitted] = []
        for decay in decays:
            if not found or not self.late():
                found.append(self._layers(copy.deepcopy(head), decay, seed))
        return min(found, key=lambda f: f.loss)

    def late(self) -> bool:
        """Whether time has run out, so that something is left out."""
        self.cut = self.cut or time.perf_counter() > self.until
        return self.cut

    def _decays(self, tried: tuple[float, ...]) -> tuple[float, ...]:
        if self.weight_decay is not None:
            return (self.weight_decay,)
        return tried if self.chooses else (DECAY,)

    def _read(self, head: nn.Module) -> str:
        return head.reads if isinstance(head, Head) else "all"

    def _convex(self, head: LinearHead) -> bool:
        rows = sum(len(b.train) for b in self.features.blocks)
        return self.convex and rows * head.classifier.weight.numel() <= LARGEST

    def logits(self, head: nn.Module, block: Block, rows: Tensor | slice) -> Tensor:
        """What a head gives for rows of a block, `[n, C]`."""
        given = "logits" if "logits" in self.slot.reads else "shared" if head is self.slot.tail else None
        if given is not None:
            return self.features.feature(self.slot, given, block, rows).to(self.device)
        read = self._read(head)
        x = self.features.feature(self.slot, read, block, rows).to(self.device)
        if not isinstance(head, Head):
            found: Tensor = head(x.movedim(0, self.slot.axis))
            return found
        if read != "all":
            return head.layers(x)
        mask = self.features.mask(self.slot, block, rows)
        return head.layers(x.movedim(0, self.slot.axis), None if mask is None else mask.to(self.device))

    def _loss(self, logits: Tensor, block: Block, rows: Tensor) -> Tensor:
        teacher = self.features.teacher(block, rows).to(self.device)
        labels = labels_at(block.labels, rows)
        return self.objective.of_one(logits, teacher, move(labels, self.device), f"the rows kept for {self.slot.exit.name}")

    def loss(self, head: nn.Module, held: bool) -> float:
        """Mean objective over the rows held out, or over those fitted to."""
        head.eval()
        total, count = 0.0, 0
        with torch.no_grad():
            for block in self.features.blocks:
                for rows in torch.split(block.held if held else block.train, 4 * ROWS):
                    total += float(self._loss(self.logits(head, block, rows), block, rows)) * len(rows)
                    count += len(rows)
        return total / max(count, 1)

    # ------------------------------------------------------------------ one linear layer

    def _linear(self, head: LinearHead) -> Fitted:
        problem = Standardised(self.features, self.slot, head, self.device)
        w, b = problem.start(head.classifier.weight.shape)

        def of(part: str) -> Callable[[Tensor, Tensor], Tensor]:
            return lambda w, b: problem.mean(part, lambda x, block, rows: self._loss(x @ w.T + b, block, rows))

        found: Fitted | None = None
        for decay in self._decays(DECAYS):
            if found is not None and self.late():
                break
            steps = minimise(of("train"), w, b, decay, self.late)
            with torch.no_grad():
                loss = float(of("held" if self.chooses else "train")(w, b))
            if found is None or loss < found.loss:
                best = w.detach().clone(), b.detach().clone()
                found = Fitted(head, decay, loss, steps + (found.steps if found else 0))
        assert found is not None
        found.head = problem.folded(head, *best)
        return found

    def again(self, fitted: Fitted) -> Fitted:
        """A linear head fitted once more, to all rows, those held out too: one problem, so there is nothing to choose."""
        if not (self.chooses and isinstance(fitted.head, LinearHead)) or any(b.validation for b in self.features.blocks):
            return fitted
        if not self._convex(fitted.head) or self.late():
            return fitted
        head = fitted.head
        problem = Standardised(self.features, self.slot, head, self.device, part="both")
        w, b = problem.start(head.classifier.weight.shape)
        steps = minimise(
            lambda w, b: problem.mean("both", lambda x, block, rows: self._loss(x @ w.T + b, block, rows)),
            w, b, fitted.weight_decay, self.late,
        )  # fmt: skip
        if self.cut:
            return fitted
        return Fitted(problem.folded(head, w.detach(), b.detach()), fitted.weight_decay, fitted.loss, fitted.steps + steps)

    # ------------------------------------------------------------------ several layers

    def _layers(self, head: nn.Module, decay: float, seed: int) -> Fitted:
        parameters = [p for p in head.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=self.lr, weight_decay=decay)
        order = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)  # dropout
        best = Fitted(head, decay)
        state, bad, since, passes, mark = copy.deepcopy(head.state_dict()), 0, 0, 0, math.inf
        most, least = (STEPS, PASSES) if self.chooses else (UNWATCHED, 1)
        while bad < PATIENCE and (best.steps < most or passes < least) and not self.cut:
            head.train()
            for block, rows in self._batches(order):
                if self.late():
                    break
                with torch.enable_grad():
                    loss = self._loss(self.logits(head, block, rows), block, rows)
                    loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                best.steps, since = best.steps + 1, since + 1
            passes += 1
            if since < ROUND and not self.cut:
                continue
            since, now = 0, self.loss(head, self.chooses)
            if not math.isfinite(now):
                raise EecompileError(
                    "the loss is not finite",
                    where=f"head of {self.slot.exit.name}, step {best.steps}",
                    got=now,
                    wanted="a finite number",
                    hint="lower lr",
                )
            if now < best.loss:
                best.loss, state = now, copy.deepcopy(head.state_dict())
            bad += 1
            if math.isinf(mark) or now < mark - BETTER * abs(mark):
                mark, bad = now, 0
        head.load_state_dict(state)
        return best

    def _batches(self, order: torch.Generator) -> Iterator[tuple[Block, Tensor]]:
        """Mini-batches in random order, each of rows of one block."""
        found = []
        for block in self.features.blocks:
            if len(block.train):
                rows = block.train[torch.randperm(len(block.train), generator=order)]
                found += [(block, part.sort().values) for part in torch.split(rows, ROWS)]
        found = [f for f in found if len(f[1]) > 1] or found  # batch norm needs two rows
        for i in torch.randperm(len(found), generator=order).tolist():
            yield found[i]


class Standardised:
    """Features of a linear head as L-BFGS wants them: normalised as the head does, mean 0 and deviation 1.

    Args:
        part: The rows whose mean and deviation are taken.
    """

    def __init__(self, features: Features, slot: Slot, head: LinearHead, device: torch.device, part: str = "train") -> None:
        self.features, self.slot, self.head, self.device = features, slot, head, device
        width = head.classifier.in_features
        count, total, square = 0, torch.zeros(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
        self.shift = self.scale = torch.zeros(())
        for x, _, _ in self._parts(part, raw=True):
            count, total = count + len(x), total + x.double().sum(0).cpu()
        mean = total / max(count, 1)
        for x, _, _ in self._parts(part, raw=True):
            square += (x.double().cpu() - mean).square().sum(0)
        deviation = (square / max(count, 1)).sqrt()
        deviation = torch.where(deviation > 1e-6 * deviation.max().clamp_min(1e-12), deviation, 1.0)
        self.shift, self.scale = mean.float().to(device), deviation.float().to(device)
        size = sum(len(b.row) for b in features.blocks) * width * 4
        self._kept: dict[str, list[tuple[Tensor, Block, Tensor]]] | None = {} if size <= features.cache.limit // 4 else None

    def _parts(self, part: str, raw: bool = False) -> Iterator[tuple[Tensor, Block, Tensor]]:
        for block in self.features.blocks:
            rows = torch.cat([block.train, block.held]) if part == "both" else getattr(block, part)
            if not len(rows):
                continue
            x = self.features.feature(self.slot, self.head.reads, block, rows).to(self.device).float()
            if isinstance(self.head.norm, nn.LayerNorm):
                x = F.layer_norm(x, x.shape[-1:], eps=self.head.norm.eps)
            yield (x if raw else (x - self.shift) / self.scale), block, rows

    def start(self, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """Weights `[C, D]` and bias `[C]` of 0."""
        zero = torch.zeros(shape, device=self.device), torch.zeros(shape[0], device=self.device)
        return zero[0].requires_grad_(), zero[1].requires_grad_()

    def mean(self, part: str, loss: Callable[[Tensor, Block, Tensor], Tensor]) -> Tensor:
        """Mean over the rows of a part of a loss that is a mean over the rows of a block; gradients go as they are made."""
        if self._kept is not None and part not in self._kept:
            self._kept[part] = list(self._parts(part))
        parts = self._kept[part] if self._kept is not None else self._parts(part)
        total, count = torch.zeros((), dtype=torch.float64, device=self.device), 0
        everything = sum(
            len(b.train) + len(b.held) if part == "both" else len(getattr(b, part)) for b in self.features.blocks
        )
        for x, block, rows in parts:
            value = loss(x, block, rows) * (len(rows) / everything)
            if value.requires_grad:
                value.backward()  # type: ignore[no-untyped-call]
            total, count = total + value.detach().double(), count + len(rows)
        return total

    def folded(self, head: LinearHead, w: Tensor, b: Tensor) -> LinearHead:
        """A head like this one with the weights of a problem in standardised features."""
        new = copy.deepcopy(head)
        with torch.no_grad():
            if isinstance(new.norm, nn.LayerNorm):
                new.norm.weight.fill_(1)
                new.norm.bias.fill_(0)
            scaled = w / self.scale
            new.classifier.weight.copy_(scaled)
            new.classifier.bias.copy_(b - scaled @ self.shift)
        return new


class Late(Exception):
    """Ends a step of L-BFGS."""


def minimise(
    loss: Callable[[Tensor, Tensor], Tensor], w: Tensor, b: Tensor, decay: float, late: Callable[[], bool] = lambda: False
) -> int:
    """L-BFGS on `loss(w, b) + decay / 2 ||w||^2`, in place; gives its number of steps. `loss` calls backward itself.

    Once it is `late`, the best point so far is taken.
    """
    least, best = math.inf, (w.detach().clone(), b.detach().clone())
    optimizer = torch.optim.LBFGS(
        [w, b], max_iter=150, history_size=20, tolerance_grad=1e-5, tolerance_change=1e-8, line_search_fn="strong_wolfe"
    )

    def closure() -> Any:
        nonlocal least, best
        if late():
            raise Late
        optimizer.zero_grad()
        with torch.enable_grad():
            value = loss(w, b)
            penalty = decay / 2 * w.square().sum()
            penalty.backward()  # type: ignore[no-untyped-call]
        value = value + penalty.detach()
        if float(value) < least:
            least, best = float(value), (w.detach().clone(), b.detach().clone())
        return value

    try:
        optimizer.step(closure)  # type: ignore[no-untyped-call]
    except Late:
        with torch.no_grad():
            w.copy_(best[0])
            b.copy_(best[1])
    optimizer.zero_grad()
    return int(optimizer.state[w]["n_iter"])
