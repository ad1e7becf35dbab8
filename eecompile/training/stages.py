"""Which stages `fit` goes through: what is trained in each, for how many epochs, how gates decide, by which objective."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from eecompile.errors import EecompileError
from eecompile.ir.recipes import TrainingStage
from eecompile.training.objectives import Objective, PerExitLoss, Priced, Reinforce, Sum
from eecompile.training.objectives import objective as resolve
from eecompile.training.plan import StagePlan

if TYPE_CHECKING:
    from eecompile.module import CompiledModule

BY_CHANCE = ("uniform", "dropped")  # choices that learn nothing meanwhile
OF_LABELS = ("sample", "every")  # choices learn from the likelihood of labels, which no loss of the user's gives


def stages_of(
    epochs: int,
    trunk: bool,
    two_stage: bool,
    asked: Sequence[TrainingStage] = (),
    task: Objective | None = None,
    heads_first: bool = False,
) -> tuple[StagePlan, ...]:
    """The stages that a strategy asks for, or one, or two.

    Args:
        epochs: Of each of two stages; those of a strategy share them.
        trunk: Whether the trunk is trained.
        asked: Stages of the strategy.
        task: The objective that theirs are added to. One that prices gates itself is taken as it is: with "reinforce" in it
            for stages that sample, else for the others.
        heads_first: Whether joint training starts from heads that are fitted to the trunk as it is.

    Raises:
        EecompileError: REINFORCE on a loss that is no classification; no stage that the objective can train.
    """
    if asked:
        priced = [part for part in parts_of(task) if isinstance(part, Priced)]
        if priced:
            samples = any(isinstance(part, Reinforce) for part in priced)
            asked = [s for s in asked if s.gate_mode not in BY_CHANCE and (s.gate_mode == "sample") == samples]
            if not asked:
                raise EecompileError(
                    "no stage of the strategy can be trained by this objective",
                    got=str(task.to_dict() if task is not None else None),
                    wanted="reinforce where decisions are sampled, choice_cost where their decisions have a gradient",
                )
            task = None
        for stage in asked:
            if stage.gate_mode == "dropped" and not trunk:
                raise EecompileError(
                    "the trunk learns to do without blocks, but is not trained",
                    where=f"stage {stage.name!r}",
                    got="trunk=False",
                    wanted="trunk=True, or a strategy with warm_up=0",
                )
            if isinstance(task, PerExitLoss) and stage.objective is not None and stage.gate_mode in OF_LABELS:
                raise EecompileError(
                    "this stage weighs the likelihood of class labels of every row",
                    where=f"stage {stage.name!r}",
                    got=f"loss={task.function_name}",
                    hint='leave that stage out: SkipNet(shares=(0.5, 0.5, 0)), Router(estimator="straight_through")',
                )
        counts = shared(epochs, [stage.share for stage in asked])
        return tuple(
            StagePlan(stage.name, n, trunk, True, _with(task, stage), stage.gate_mode, stage.kept_open, stage.full_share)
            for stage, n in zip(asked, counts, strict=True)
            if n
        )
    if two_stage:
        return (StagePlan("trunk", epochs, True, False), StagePlan("heads", epochs, False, True))
    if trunk:
        first = (StagePlan("heads", epochs, False, True),) if heads_first else ()
        return (*first, StagePlan("joint", epochs, True, True))
    return (StagePlan("heads", epochs, False, True),)


def parts_of(task: Objective | None) -> list[Objective]:
    """The objective, or the parts of a sum."""
    if isinstance(task, Sum):
        return [p for part in task.parts for p in parts_of(part)]
    return [] if task is None else [task]


def _with(task: Objective | None, stage: TrainingStage) -> Objective | None:
    if task is None or stage.objective is None:
        return None
    return Sum((task, resolve(stage.objective)))


def shared(epochs: int, shares: Sequence[float]) -> list[int]:
    """Whole epochs for each share, by largest remainders; of equal ones the earlier comes first."""
    total = sum(shares)
    exact = [epochs * share / total for share in shares]
    counts = [int(e + 1e-9) for e in exact]
    order = sorted(range(len(shares)), key=lambda i: (round(counts[i] - exact[i], 9), i))
    for i in order[: epochs - sum(counts)]:
        counts[i] += 1
    return counts


@contextlib.contextmanager
def gates_deciding(fast: CompiledModule, mode: str, kept_open: float = 0.0, full_share: float = 0.0) -> Iterator[None]:
    """`fast.gate_mode` is `mode` inside, the first `kept_open` of the gates are open, and all of them for the first
    `full_share` of a batch's rows; as before afterwards."""
    before, first = fast.train_mode, round(kept_open * len(fast.gates))
    fast.train_mode = replace(before, gates=mode, kept_open=first, full_share=full_share)
    try:
        yield
    finally:
        fast.train_mode = replace(before, trunk=fast.train_mode.trunk)
