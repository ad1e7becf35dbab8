"""`fit`: trains what was inserted, the trunk too where asked, with checkpoints that resume bit for bit.

A plain PyTorch loop on Hugging Face `accelerate`: one process by default, several under `torchrun` or
`accelerate launch` with no change. What a step does is in `loop.py`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer

from eecompile.errors import EecompileError, near, shown
from eecompile.plain import as_path, check_callable, check_number
from eecompile.result import Result
from eecompile.training.batches import length_of, require_repeatable
from eecompile.training.checkpoint import Checkpoints
from eecompile.training.fit_report import FitReport
from eecompile.training.loop import Loop
from eecompile.training.objectives import Exits, Loss, Objective, PerExitLoss, Sum
from eecompile.training.objectives import objective as resolve
from eecompile.training.plan import Event, Plan
from eecompile.training.scores import Metric
from eecompile.training.stages import stages_of
from eecompile.training.tasks import OWN, REGRESSION, first_batch, squared_error, task_of

if TYPE_CHECKING:
    from eecompile.module import CompiledModule


def fit(
    fast: CompiledModule,
    loader: Iterable[Any],
    *,
    epochs: int = 1,
    trunk: bool | None = None,
    two_stage: bool | None = None,
    lr: float = 1e-3,
    trunk_lr: float | None = None,
    train_in_place: bool = False,
    weight_decay: float | None = None,
    optimizer: Callable[[list[dict[str, Any]]], Optimizer] | None = None,
    scheduler: str | Callable[[Optimizer], Any] | None = None,
    objective: str | Mapping[str, Any] | Objective | None = None,
    loss: Loss | None = None,
    metric: Metric | None = None,
    val_loader: Iterable[Any] | None = None,
    patience: int | None = None,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    checkpoint_every: int | None = None,
    resume: bool | str = True,
    seed: int = 0,
    accelerator: Any = None,
    max_grad_norm: float | None = None,
    cached: bool | None = None,
    draws: int | None = None,
    cache_mb: int = 1024,
    seconds: float | None = None,
    progress: bool = True,
    callbacks: Sequence[Callable[[Event], None]] = (),
) -> FitReport:
    """Trains the heads; with `trunk=True` the whole model jointly; with `two_stage=True` one after the other.

    With a frozen trunk what the heads read is computed once and kept, and each head is fitted to convergence on it: linear
    ones by L-BFGS, others by AdamW with early stopping. A fifth of the rows is held out for that (or `val_loader` is used),
    and where the strategy's head is "auto" the kind of head of each exit is chosen there, as is the weight decay. Where that
    cannot be (gates, routers, exits that answer together, options of a loop of batches), heads are trained batch by batch,
    and the report says why.

    Args:
        fast: The compiled module. Its mode, and what `prepare_training` restores, are as before afterwards.
        loader: Yields `(inputs, labels)` or Hugging Face batches, again and again.
        epochs: Passes over `loader`; where features are kept at most so many, and one unless the data change. With
            `two_stage`, of each stage. Strategies with gates share them among their stages.
        trunk: Whether the model's own layers are trained too. False leaves every parameter of them untouched;
            None, the default, is what the strategy asks for (`fast.strategy.joint`), mostly False.
        two_stage: First the model with its own output, then the heads on the frozen model (DeeBERT, Xin et
            al. 2020). None is what the strategy asks for, unless `trunk` is False.
        lr: Learning rate of the heads.
        trunk_lr: Learning rate of the trunk, a tenth of `lr` by default.
        train_in_place: The trunk is trained in the user's model itself, which changes with it. By default in a copy, made
            when the trunk is first trained: the user's model stays as it is, and `full` and `evaluate` compare with that.
        weight_decay: Of the default AdamW, 0.01 by default. On kept features chosen where none is given; for linear heads
            it is that of `weight_decay / 2 * ||W||^2` over standardised features.
        optimizer: Makes an optimizer from parameter groups (dicts with "params", "lr", "weight_decay").
            AdamW by default.
        scheduler: None, "cosine" (to 0 over each stage), or a function that makes a scheduler from the
            optimizer; it is stepped after every optimizer step.
        objective: Name, dict or instance (`training/objectives`); by default that of `fast.strategy`. The price of gates
            comes on top, unless it is in there ("exits+choice_cost"); then only the stages that it can train are run.
        loss: `(output, labels) -> scalar`, instead of `objective`. By default what fits the labels: cross entropy, binary
            cross entropy or mean squared error (`training/tasks.py`); the report says which.
        metric: `(prediction, labels) -> [B]`, higher is better; shown instead of accuracy.
        val_loader: Measured after every epoch.
        patience: Stop after this many epochs without a smaller validation loss, and keep the best epoch's
            parameters. Needs `val_loader`. With `two_stage`, for each stage.
        checkpoint_dir: Where checkpoints go. None: none are written.
        checkpoint_every: Steps between checkpoints, in addition to one at the end of each epoch.
        resume: True goes on from the newest checkpoint of `checkpoint_dir` if there is one; "must" insists
            on one; False starts anew, and old checkpoints go once a new one is whole. A run that is resumed
            after a kill at any step ends with the same parameters, bit for bit, as one that was never broken
            (one process, same machine and thread count, a loader whose order depends on its generators
            alone). Where features are kept, checkpoints follow each head, and the pass over the data is made anew. A run
            that had ended is not trained further,
            but more `epochs` may be asked for where there is no scheduler.
        seed: Of everything random in training; the caller's generators are put back at the end.
        accelerator: An `accelerate.Accelerator` of the caller's, for mixed precision and the like (accelerate takes one
            precision for all of a process: make it before the first `fit`). By
            default one that leaves the model on the device where it is.
        max_grad_norm: Gradients are scaled down to this 2-norm.
        cached: Whether heads are fitted on kept features: None where the trunk is frozen and that can be, True insists, and
            with `trunk=True` fits them so before the joint training starts; False trains batch by batch.
        draws: Passes of the trunk over data that change from pass to pass (random augmentation). None finds that out, and
            takes `epochs`.
        cache_mb: MiB of features kept in memory; more go to files in a temporary directory.
        seconds: Time for heads on kept features, with `cached=True`, from the start of this call and shared among the heads:
            what has not converged by then stays as it is, and the report says so. The pass of the trunk is not cut short.
        progress: A progress bar, where the output is a terminal.
        callbacks: Each is called with an `Event` after every step and every epoch.

    Returns:
        FitReport: Per epoch the loss, the accuracy of every exit, the learning rate and the time.

    Raises:
        EecompileError: `cached=True` where that cannot be; an empty loader; labels of a wrong dtype, shape or range (before
            the backward pass); a loss or gradient that is not finite (the last checkpoint is kept); a checkpoint of other
            settings; a full disk while a checkpoint is written (the older one is kept); nothing to train.
        KeyboardInterrupt: On Ctrl-C, once the running step has ended, a checkpoint is written and how to
            resume is printed. A second Ctrl-C stops at once.
    """
    counts = {"epochs": epochs, "seed": seed, "cache_mb": cache_mb}
    check_number("lr", lr, above=0)
    optional = {"draws": draws, "patience": patience, "checkpoint_every": checkpoint_every}
    counts |= {name: count for name, count in optional.items() if count is not None}
    _check_numbers(counts, {"trunk_lr": trunk_lr, "max_grad_norm": max_grad_norm, "seconds": seconds}, weight_decay)
    _check_functions(optimizer, scheduler, loss, metric, callbacks)
    if checkpoint_dir is not None:
        as_path("checkpoint_dir", checkpoint_dir)
    if not (isinstance(resume, bool) or resume == "must"):
        raise EecompileError("unknown value of resume", got=shown(resume), wanted="True, False or 'must'")
    if accelerator is not None and not hasattr(accelerator, "num_processes"):
        raise EecompileError(
            "accelerator= is no accelerator", got=type(accelerator).__name__, wanted="accelerate.Accelerator()"
        )
    if patience is not None and val_loader is None:
        raise EecompileError("early stopping needs data to watch", got="patience without val_loader")
    if (checkpoint_every is not None or resume == "must") and checkpoint_dir is None:
        raise EecompileError("there is no place for checkpoints", got="checkpoint_dir=None", hint="pass checkpoint_dir=")
    if seconds is not None and cached is not True:
        raise EecompileError("seconds= is for heads on kept features", got=f"cached={cached}", wanted="cached=True")
    if loss is not None and objective is not None:
        raise EecompileError("two objectives", got="both loss= and objective=", wanted="one of them")
    _check_scheduler(scheduler, loader)
    strategy = getattr(fast, "strategy", None)
    if two_stage is None:
        two_stage = trunk is not False and bool(getattr(strategy, "two_stage", False))
    if trunk is None:
        trunk = bool(getattr(strategy, "joint", False))
    task = OWN
    if loss is None:
        labels, loader = first_batch(loader)
        task = task_of(fast, labels) or ""
        loss = squared_error if task == REGRESSION and objective is None else None
    chosen = PerExitLoss(loss) if loss is not None else objective_of(fast, objective)
    asked = tuple(getattr(strategy, "stages", ()))
    stages = stages_of(epochs, trunk, two_stage, asked, chosen, heads_first=cached is True)
    if sum(stage.epochs for stage in stages) > 1:
        require_repeatable(loader, f"{epochs} epochs were asked for", "the training loader")
        if val_loader is not None:
            require_repeatable(val_loader, "it is measured after every epoch", "val_loader")
    plan = Plan(
        stages=stages,
        objective=chosen,
        metric=metric,
        lr=lr,
        trunk_lr=lr / 10 if trunk_lr is None else trunk_lr,
        weight_decay=0.01 if weight_decay is None else weight_decay,
        optimizer=optimizer,
        scheduler=scheduler,
        patience=patience,
        checkpoint_every=checkpoint_every,
        seed=seed,
        max_grad_norm=max_grad_norm,
        progress=progress,
        callbacks=tuple(callbacks),
        cached=cached,
        draws=draws,
        cache_mb=cache_mb,
        seconds=math.inf if seconds is None else seconds,
        decay=weight_decay,
        accelerator=accelerator is not None,
        epochs=epochs,
        task=task,
    )
    if any(stage.trunk for stage in stages):
        fast.own_trunk(in_place=train_in_place)
    if task:
        fast.task = task
    checkpoints = None if checkpoint_dir is None else Checkpoints(checkpoint_dir)
    return Loop(fast, loader, val_loader, plan, checkpoints, accelerator).run(resume)


LEAST = {"epochs": 1, "seed": 0, "cache_mb": 0, "draws": 1, "patience": 1, "checkpoint_every": 1}


def _check_numbers(counts: Mapping[str, int], positive: Mapping[str, float | None], weight_decay: float | None) -> None:
    for name, count in counts.items():
        check_number(name, count, least=LEAST[name], whole=True)
    for name, value in positive.items():
        if value is not None:
            check_number(name, value, above=0)
    if weight_decay is not None:
        check_number("weight_decay", weight_decay, least=0)


def _check_functions(optimizer: Any, scheduler: Any, loss: Any, metric: Any, callbacks: Any) -> None:
    check_callable("optimizer", optimizer, "(parameter groups) -> torch.optim.Optimizer")
    if not isinstance(scheduler, str):
        check_callable("scheduler", scheduler, '"cosine", or (optimizer) -> a scheduler')
    check_callable("loss", loss, "(output, labels) -> a scalar tensor")
    check_callable("metric", metric, "(prediction, labels) -> [B]")
    if isinstance(callbacks, str) or not isinstance(callbacks, Iterable):
        raise EecompileError("callbacks= is a list of functions", got=shown(callbacks)[:80], wanted="[(event) -> None]")
    for callback in callbacks:
        check_callable("each of callbacks", callback, "(event) -> None")


def _check_scheduler(scheduler: Any, loader: Iterable[Any]) -> None:
    if isinstance(scheduler, str) and scheduler != "cosine":
        raise EecompileError("unknown scheduler", got=repr(scheduler), wanted=near(scheduler, ["cosine"]))
    if scheduler == "cosine" and length_of(loader) is None:
        raise EecompileError(
            "a cosine schedule needs to know the number of batches",
            got=f"a {type(loader).__name__} without a length",
            hint="give the loader a __len__, or pass scheduler=None",
        )


def objective_of(fast: CompiledModule, spec: str | Mapping[str, Any] | Objective | None = None) -> Objective:
    """The objective asked for, else the one of the strategy, else cross entropy (plus exit scores where
    learned)."""
    spec = spec if spec is not None else getattr(getattr(fast, "strategy", None), "objective", None)
    if spec is None:
        return Exits(learned=any(record.criterion.learned for record in fast.exits))
    return resolve(spec)


def loss_of(fast: CompiledModule, result: Result, labels: Any) -> Tensor:
    """The strategy's objective for the present gate mode, kept from call to call; a new one takes over the others' state.

    What the first labels say of the task stays with the module, as `fit` does it.
    """
    if fast.task is None:
        fast.task = task_of(fast, labels)
    kept, mode = fast.objectives, fast.train_mode.gates
    if mode not in kept:
        stages = (stage.objective for stage in fast.strategy.stages if stage.gate_mode == mode)
        price = next((spec for spec in stages if spec is not None), None)
        task = objective_of(fast)
        chosen = task if price is None else Sum((task, resolve(price)))
        for other in kept.values():
            chosen.take(other.passed_on())
        kept[mode] = chosen
    loss: Tensor = kept[mode](result, labels)
    return loss
