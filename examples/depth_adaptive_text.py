"""Depth-adaptive Transformer (Elbayad et al. 2020): MiniLM-L6 on IMDB, where each review runs its first blocks only.

The model is the encoder of the fine-tuned trunk with a classifier on the mean of its last states, fitted to it as it is: a
first token has seen little of the others in an early block. Both learn to be right at every depth, together with a choice of
depth made once after the first block; a second program, on the same weights, then learns to stop block by block. Thresholds
are chosen on the validation part: 0.5, as trained; the shallowest that loses at most 1% with 95% confidence; the shallowest
that loses at most 1% on those rows. The test part is evaluated once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from eecompile import eecompile
from eecompile.strategies import DepthAdaptive
from examples import datasets
from examples._common import Options, Recipe, Record, Trunk, Variant, fitted, main, minilm_trunk, rows_of, timed, trunk
from examples._constant import alternatives
from examples._depths import Depths, depths
from examples._parts import imdb_parts
from examples.trunks import reviews

ROWS = {"train": 8_000, "val": 4_000, "test": 4_000}
ROWS_QUICK = {"train": 256, "val": 128, "test": 128}
ROWS_OF_CLASSIFIER = 4_000
MODES: dict[str, dict[str, Any]] = {
    "up_front": {"trunk": True, "epochs": 1, "lr": 5e-3, "trunk_lr": 5e-5, "max_grad_norm": 1.0},
    "halting": {"trunk": False, "epochs": 1, "lr": 5e-3},
}
PRICE = 0.3  # loss that running the five gated blocks must be worth
ALLOWED, DELTA = 0.01, 0.05
THRESHOLDS = [k / 200 for k in range(200)]


class MeanClassifier(nn.Module):
    """An encoder and a classifier on the mean of its states over the real positions: to logits [B, 2]."""

    def __init__(self, encoder: nn.Module, width: int, hidden: int = 128, labels: int = 2) -> None:
        super().__init__()
        self.encoder = encoder
        self.norm = nn.LayerNorm(width)
        self.hidden, self.classifier = nn.Linear(width, hidden), nn.Linear(hidden, labels)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weight = attention_mask.unsqueeze(-1).to(states.dtype)
        mean = (states * weight).sum(1) / weight.sum(1).clamp(min=1)
        y: Tensor = self.classifier(torch.relu(self.hidden(self.norm(mean))))
        return y


def mean_trunk(*, quick: bool = False, seed: int = 0) -> Trunk:
    """`MeanClassifier` fitted to the encoder of `minilm_trunk`, which stays as it is."""
    recipe = Recipe("minilm-mean-imdb", 1, 32, 1e-3, seed=seed, rows=ROWS_OF_CLASSIFIER, bf16=True)
    if quick:
        recipe = Recipe("minilm-mean-imdb-quick", 4, 32, 1e-2, seed=seed, rows=256, standin=True)

    def build() -> nn.Module:
        encoder: Any = minilm_trunk(quick=quick, seed=seed).model.bert
        torch.manual_seed(seed)
        return MeanClassifier(encoder.requires_grad_(False), encoder.config.hidden_size)

    got = trunk(recipe, build, reviews(quick))
    got.model.requires_grad_(True)
    return got


def program(model: nn.Module, mode: str, trains_model: bool, example: dict[str, Any]) -> Any:
    """The model, its parameters shared between the programs."""
    strategy = DepthAdaptive(mode, price=PRICE, trunk=trains_model, unit="linear")
    return eecompile(model, strategy, example_kwargs={k: v[:4] for k, v in example.items() if k != "labels"})


def row_of(record: Record, fast: Any, seen: Depths, threshold: float, how: str, original: float) -> Variant:
    """Judges one threshold on the test part: a row of the record, and what is to be timed."""
    steps = seen.depth_at(threshold)
    fast.set_gate_thresholds(threshold)
    saves = torch.tensor([gate.saves for gate in fast.gates]).cumsum(0)
    scored = float(fast.costs([False] * len(fast.exits))[-1])  # everything open, scores included
    cost = scored - float(saves[-1]) + torch.cat((torch.zeros(1), saves))[steps].mean()
    taken = torch.bincount(steps, minlength=len(fast.gates) + 1) / len(steps)
    depths_at = [1.0 - float(saves[-1]), *(1.0 - float(saves[-1]) + saves).tolist()]
    right = seen.right().float().mean(0).tolist()
    points = [(f"{n + 1} blocks", at, right[n]) for n, at in enumerate(depths_at)]
    row = record.row(
        f"IMDB, MiniLM-L6, {fast.strategy.mode}",
        thresholds=how,
        threshold=threshold,
        original_accuracy=original,
        full_accuracy=float(seen.right()[:, -1].float().mean()),
        accuracy=seen.accuracy_at(steps),
        cost=float(cost),
        share={f"{n + 1} blocks": float(share) for n, share in enumerate(taken)},
        mean_steps=float(steps.float().mean()),
        accuracy_at_depth=right,
        **alternatives(points, float(cost)),
    )
    return Variant(row, fast, lambda: fast.set_gate_thresholds(threshold))


def example(options: Options, record: Record) -> None:
    """From training to timing."""
    quick = options.quick
    rows = ROWS_QUICK if quick else ROWS
    parts = imdb_parts(rows, quick=quick, seed=options.seed)
    trunk = mean_trunk(quick=quick, seed=options.seed)
    record.note(data="IMDB", rows_of_data=rows, tokens=datasets.SEQUENCE, price=PRICE, allowed=ALLOWED)
    record.note(model="MiniLM-L6 (all-minilm-l6-v2) with a classifier on the mean", trunk=trunk.to_dict())
    some = next(iter(parts["val"]))
    programs = {}
    for mode, settings in MODES.items():
        settings = {**settings, **({"epochs": 4, "lr": 1e-2} if quick else {})}
        fast = programs[mode] = program(trunk.model, mode, settings.pop("trunk"), some)
        name = f"depth-adaptive-imdb-{mode}"
        fit = fitted(fast, parts["train"], name, options, trunk, scheduler="cosine", bf16=not quick, **settings)
        record.note(**{mode: {"strategy": str(fast.strategy), "fit": fit}})
    record.done("train")
    variants = []
    for fast in programs.values():
        kept = fast.kept_as
        seen = {part: depths(fast, parts[part], kept.with_suffix(f".{part}.safetensors")) for part in ("val", "test")}
        rules = {
            "as trained": 0.5,
            "guaranteed": seen["val"].guaranteed(ALLOWED, DELTA, THRESHOLDS),
            "empirical": seen["val"].cheapest(ALLOWED, THRESHOLDS),
        }
        for how, threshold in rules.items():
            variants.append(row_of(record, fast, seen["test"], threshold, how, trunk.accuracy))
    record.done("evaluate")
    original = mean_trunk(quick=quick, seed=options.seed).model  # training moved the other one's weights
    timed(record, original, rows_of(parts["test"], 4), variants, (1, 32, 64), {1: 32, 32: 96, 64: 128}, rounds=7)


if __name__ == "__main__":
    main("depth_adaptive_text", __doc__, example)
