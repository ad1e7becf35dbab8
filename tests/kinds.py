"""One small program of every kind: what decides in it, how it is built, and inputs for it.

`KINDS[name].build()` compiles the model with units whose scores differ from row to row; `tests/test_invariants.py` says what
has to hold of each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from eecompile import CompiledModule, strategies
from eecompile.strategies import Strategy
from tests.compositions import Squash
from tests.gates.adaptive import rows, tower
from tests.support import Fingerprint
from tests.support import compiled as eecompile
from tests.zoo import ZOO

Call = tuple[tuple[Any, ...], dict[str, Any]]
WHERE = {"exits": ("blocks.0", "blocks.2"), "head": "linear", "max_head_share": 9.0}
BRANCHES = ("blocks.1", "blocks.3")


def tower_call(batch: int, seed: int) -> Call:
    return (rows(batch, seed)[0],), {}


def text_call(name: str) -> Callable[[int, int], Call]:
    return lambda batch, seed: ZOO[name].inputs(batch, seed=seed)


@dataclass(frozen=True)
class Kind:
    """A kind of program.

    Attributes:
        strategy: What goes into the model.
        models: The user's model, or the models of a cascade by name; in eval mode.
        members: Of a cascade: what its models are compiled with before they become part of it.
        call: `(batch, seed)` to the arguments of one call.
        exact: Whether the captured graph gives the model's numbers bit for bit; else within 1e-6.
        splits: Fields of a result that differ from row to row at some random settings.
        executors: What must agree with the reference.
        saves: Whether it can be saved.
        often: Whether `make test` has it; a kind that is close to another one, or slow, is left to `make test-all`.
        options: Further options of `eecompile`.
    """

    strategy: Callable[[], Strategy]
    models: Callable[[], nn.Module | dict[str, nn.Module]] = lambda: tower(4)
    members: dict[str, Callable[[], Strategy]] = field(default_factory=dict)
    call: Callable[[int, int], Call] = tower_call
    exact: bool = True
    splits: tuple[str, ...] = ("exit_index",)
    executors: tuple[str, ...] = ("compact", "simulate")
    saves: bool = True
    often: bool = True
    options: dict[str, Any] = field(default_factory=dict)

    def build(self) -> Program:
        models = self.models()
        parts = models if isinstance(models, dict) else {"": models}
        before = {name: Fingerprint.of(m) for name, m in parts.items()}
        args, kwargs = self.call(6, 0)
        given: Any = models
        if self.members:
            given = {
                n: eecompile(m, self.members[n](), example_inputs=args, example_kwargs=kwargs) for n, m in parts.items()
            }
        fast = eecompile(given, self.strategy(), example_inputs=args, example_kwargs=kwargs, **self.options)
        spread(fast)
        return Program(self, list(parts.values())[-1], parts, fast, before)

    def batches(self, count: int = 3, size: int = 6) -> list[tuple[Any, Tensor]]:
        """Batches to train on; labels 0 and 1."""
        found = []
        for k in range(count):
            args, kwargs = self.call(size, 20 + k)
            found.append((kwargs or args[0], torch.arange(size) * (k + 2) % 3 % 2))
        return found


@dataclass(frozen=True)
class Program:
    """A kind, compiled; `model` is what answers in the end."""

    kind: Kind
    model: nn.Module
    parts: dict[str, nn.Module]
    fast: CompiledModule
    before: dict[str, Fingerprint]

    def changes(self) -> list[str]:
        return [f"{name}: {c}" for name, b in self.before.items() for c in b.changes(self.parts[name])]


def spread(fast: CompiledModule, seed: int = 0) -> None:
    """Gates, halting units and routers whose scores differ from row to row."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in [*fast.gate_units.parameters(), *fast.route_units.parameters(), *fast.combination.parameters()]:
            if p.ndim == 2:
                p.copy_(torch.randn(p.shape, generator=generator) / p.shape[1] ** 0.5)


def exits(**options: Any) -> Kind:
    return Kind(lambda: strategies.Branchy(**{**WHERE, **options}))


def text(strategy: Callable[[], Strategy], name: str = "bert", **more: Any) -> Kind:
    return Kind(strategy, lambda: ZOO[name].model(), call=text_call(name), options=dict(ZOO[name].options), **more)


def two_towers() -> dict[str, nn.Module]:
    return {"small": tower(2, seed=1), "large": tower(4, seed=2)}


def cascade(**more: Any) -> Kind:
    return Kind(models=two_towers, **more)


def router(to: Any, **options: Any) -> Kind:
    sent = strategies.Router(at="blocks.0", to=to, over=None if to == "exits" else BRANCHES, unit="linear")
    return Kind(lambda: strategies.Branchy(router=sent, **options), splits=("route",))


KINDS: dict[str, Kind] = {
    "exits by a score": exits(criterion="max_probability"),
    "exits by entropy, mlp heads": replace(exits(criterion="entropy", head="mlp"), often=False),
    "exits by energy": replace(exits(criterion="energy"), often=False),
    "exits by margin": replace(exits(criterion="margin"), often=False),
    "exits by a learned score": replace(exits(criterion="learned"), often=False),
    "patience": exits(criterion="patience", exits="every-block"),
    "ensemble": replace(exits(criterion="max_probability", combine="ensemble"), often=False),
    "ensemble by patience": replace(exits(criterion="patience", combine="ensemble", exits="every-block"), often=False),
    "surest exit": exits(criterion="learned", combine="confident"),
    "weighted ensemble": exits(criterion="max_probability", combine="weighted"),
    "anytime": Kind(lambda: strategies.Anytime(head="linear"), often=False),
    "gates": Kind(lambda: strategies.SkipNet(unit="linear", open_bias=0.0), splits=("gates",)),
    "recurrent gates on halves": text(
        lambda: strategies.SkipNet("halves", unit="recurrent", open_bias=0.0, min_open=2), splits=("gates",), often=False
    ),
    "depth up front": Kind(lambda: strategies.DepthAdaptive(min_depth=0, open_bias=0.0), splits=("gates", "steps")),
    "depth by gates": Kind(
        lambda: strategies.DepthAdaptive("gates", unit="linear", open_bias=0.0), splits=("gates",), often=False
    ),
    "widths and exits": Kind(
        lambda: strategies.SelfAdaptive(exits=1, head="linear", widths=(0.25, 0.5, 1.0), parts="every-block", open_bias=0.0),
        splits=("widths", "gates", "exit_index"),
    ),
    "halting": Kind(lambda: strategies.Act(halting_bias=-0.5), splits=("steps",)),
    "halting per position": text(lambda: strategies.Act(per_token=True, halting_bias=-0.5), splits=("steps",)),
    "a repeated block": Kind(lambda: strategies.Act("blocks.1", max_steps=3, halting_bias=-0.5), splits=("steps",)),
    "pondernet": Kind(lambda: strategies.Act(halting="pondernet", halting_bias=-0.5), splits=("steps",), often=False),
    "router to exits": router("exits", **{**WHERE, "exits": BRANCHES[:1] + ("blocks.2",)}),
    "router to branches": router({"light": 0.5, "squash": Squash()}, exits=("blocks.0",), head="linear", max_head_share=9.0),
    "cascade": cascade(strategy=lambda: strategies.Cascade(criterion="margin", order="given"), often=False),
    "cascade of compiled models": cascade(
        strategy=lambda: strategies.Cascade(order="given"),
        members={
            "small": lambda: strategies.SkipNet(unit="linear", open_bias=0.0),
            "large": lambda: (
                strategies.Branchy(exits=1, head="linear", criterion="max_probability") + strategies.Act(halting_bias=-0.5)
            ),
        },
        splits=("exit_index", "gates", "steps"),
    ),
    "exits and halting": Kind(
        lambda: strategies.Branchy(**WHERE, criterion="max_probability") + strategies.Act(halting_bias=-0.5),
        splits=("exit_index", "steps"),
        often=False,
    ),
    "captured as blocks": replace(
        exits(criterion="max_probability"), executors=("compact",), saves=False, options={"capture": "blocks"}
    ),
}
