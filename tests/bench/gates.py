"""Gated blocks: how much of what closed gates could save is saved, and what open gates cost.

A gate on every residual block, with a unit of its own (convolutional or linear) or one policy for all; thresholds between
the scores that the gates really give close each for the same share of the rows. The ideal is the model's own modules in
eager mode at the batch sizes that are left: no score, no decision, no copy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eecompile.ir.settings import GATES
from eecompile.measuring import summary
from eecompile.strategies import SelfAdaptive, SkipNet, Strategy
from tests.bench import models
from tests.bench.groups import Context
from tests.bench.models import Subject
from tests.bench.record import Figure, Target, timed, with_times

SHARES = (0.3, 0.6)
OPEN = 1e-9  # decided row by row, and no score is lower
AT_LEAST, AT_MOST = Target(0.9, "at least"), Target(1.05)
UNITS: dict[str, Strategy] = {
    "conv": SkipNet(),
    "linear": SkipNet(unit="linear"),
    "one policy": SelfAdaptive(exits=None, parts="every-block", open_bias=0.0),
}


def run(context: Context) -> list[Figure]:
    found = []
    for unit, strategy in UNITS.items():
        subject = models.resnet(8 if context.small else 64, strategy, context.device)
        found += figures(replace(subject, name=f"{subject.name}, {unit}"), context)
    return found


def figures(subject: Subject, context: Context) -> list[Figure]:
    fast = subject.fast
    spread_out(subject)
    settings = {0.0: [OPEN] * len(fast.gates)} | {share: close(subject, share) for share in SHARES}
    calls: dict[str, Callable[[], Any]] = {"original": subject.original}
    for share, thresholds in settings.items():
        calls[_name(share)] = _set_and_run(subject, thresholds)
        if share:
            calls[f"{_name(share)}, ideal"] = ideal(subject, share)
    rounds = context.measure(calls)
    made = [timed(f"{subject.name}, all gates open", rounds, _name(0.0), "original", AT_MOST)]
    for share in SHARES:
        times = zip(*(rounds.times[n] for n in ("original", _name(share), f"{_name(share)}, ideal")), strict=True)
        value, spread = summary([(o - r) / (o - i) for o, r, i in times])
        figure = Figure(f"{subject.name}, {_name(share)}", value, "of the ideal saving", spread, target=AT_LEAST)
        made.append(with_times(figure, rounds))
        speed, _ = rounds.ratio("original", _name(share))
        figure.detail = {"rows skipped at each gate": count(subject, share), "against the original": speed}
    units, parts = alone(subject, settings[SHARES[0]], context)
    for figure in made:
        figure.detail |= {"gates": len(fast.gates), "unit": fast.gates[0].head_kind, **parts}
        if not figure.met:
            figure.cause = f"Scores alone take {units:.1%} of the original's time, decisions and copies the rest."
    return made


def alone(subject: Subject, thresholds: Sequence[float], context: Context) -> tuple[float, dict[str, float]]:
    """Time of the gates' units by themselves on what they read, over the original's."""
    fast = subject.fast
    fast.set_gate_thresholds(list(thresholds))
    units = units_of(subject)
    seen: list[tuple[Any, ...]] = []
    hooks = [u.register_forward_pre_hook(lambda _, args: seen.append(args)) for u in units]
    with torch.no_grad():
        fast.observe(**subject.inputs)
    for hook in hooks:
        hook.remove()

    def score() -> None:
        for unit, args in zip(units, seen, strict=True):
            unit(*args)

    rounds = context.measure({"original": subject.original, "scores": score})
    share, _ = rounds.ratio("scores", "original")
    return share, {"time of the scores over the original's": share}


def _name(share: float) -> str:
    return f"{share:.0%} closed"


def _set_and_run(subject: Subject, thresholds: list[float]) -> Callable[[], Any]:
    def call() -> Any:
        subject.fast.set_gate_thresholds(thresholds)
        return subject.compiled()

    return call


def count(subject: Subject, share: float) -> int:
    """Rows that each gate is closed for."""
    return round(share * subject.size)


def units_of(subject: Subject) -> list[nn.Module]:
    """The modules that score: gates may share one."""
    return list(dict.fromkeys(gate.head for gate in subject.fast.gates))


def spread_out(subject: Subject, factor: float = 10.0) -> None:
    """Units with larger weights and logits around 0: fresh ones give all rows nearly the same score."""
    with torch.no_grad():
        for unit in units_of(subject):
            layer: Any = unit.get_submodule("score")
            layer.weight.mul_(factor)
            layer.bias.zero_()


def close(subject: Subject, share: float) -> list[float]:
    """Thresholds that close every gate for that share of the rows; each gate's decision moves the scores of the next."""
    fast, k = subject.fast, count(subject, share)
    fast.set_gate_thresholds(OPEN)
    for i, gate in enumerate(fast.gates):  # in turn, since a call keeps the settings that it began with
        scores = fast.observe(**subject.inputs).trace.gate_scores
        assert scores is not None
        ranked = scores[:, i].sort().values
        fast.set_thresholds({gate.name: float(ranked[k - 1] + ranked[k]) / 2})
    thresholds = list(fast.settings[GATES])
    gates = fast.run(**subject.inputs).gates
    assert gates is not None
    found = (~gates).sum(0).tolist()
    if found != [count(subject, share)] * len(thresholds):
        raise ValueError(f"wanted {count(subject, share)} rows to be skipped at each gate, and {found} were")
    return thresholds


def ideal(subject: Subject, share: float) -> Callable[[], Tensor]:
    """The model's own modules, gated blocks on the rows that are left."""
    left = subject.size - count(subject, share)
    model: Any = subject.model
    if "x" in subject.inputs:
        return _bare_resnet(model, {g.region for g in subject.fast.gates}, subject.inputs["x"], left)
    return _bare_bert(model, subject.inputs["input_ids"], left)


def _bare_resnet(model: Any, gated: set[str], x: Tensor, left: int) -> Callable[[], Tensor]:
    blocks = [(f"stage{k}.{i}", b) for k in (1, 2, 3) for i, b in enumerate(model.get_submodule(f"stage{k}"))]
    taken: list[Tensor] = []
    with torch.no_grad():
        h = F.relu(model.bn1(model.conv1(x)))
        for name, block in blocks:  # what each gated block is given: other numbers take the same time
            taken.append(h[:left].clone() if name in gated else h)
            h = block(h)

    def call() -> Tensor:
        h = F.relu(model.bn1(model.conv1(x)))
        for (name, block), rows in zip(blocks, taken, strict=True):
            if name in gated:
                block(rows)
            else:
                h = block(h if h.shape == rows.shape else rows)
        y: Tensor = model.fc(h.mean((2, 3)))
        return y

    return call


def _bare_bert(model: Any, ids: Tensor, left: int) -> Callable[[], Tensor]:
    with torch.no_grad():
        some = model.bert.embeddings(input_ids=ids)[:left].clone()

    def call() -> Tensor:
        whole = model.bert.embeddings(input_ids=ids)
        hidden = some
        for layer in model.bert.encoder.layer:
            hidden = layer(hidden)
        y: Tensor = model.classifier(model.bert.pooler(whole))
        return y

    return call
