"""What a failed comparison of graph and model comes from, where the model itself is the cause."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from eecompile.capture.source import line_here
from eecompile.errors import UnsupportedModelError

REPEATED = 1e-5  # two calls on the same input may differ by this, relative to the largest value: sums in another order


class _Draws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the first operator that draws random numbers, and the line of the model that calls it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.model, self.found = model, ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Attention has the tag whether or not its dropout is on.
        if not self.found and torch.Tag.nondeterministic_seeded in func.tags and "attention" not in func.__name__:
            line = line_here(self.model)
            self.found = f" from {func}" + (f" at {line}" if line else "")
        return func(*args, **(kwargs or {}))


def raise_cause(
    run: Callable[[Sequence[torch.Tensor]], Any],
    flat: Sequence[torch.Tensor],
    paths: Sequence[str],
    model: nn.Module,
    where: str,
) -> None:
    """Calls the model twice on the same input, and looks for batch norm that takes statistics of the batch.

    Args:
        run: The model on flat tensors.
        paths: Names of the inputs.

    Raises:
        UnsupportedModelError: The model writes to its inputs, draws random numbers, or normalises over the batch.
    """
    given = [t.clone() for t in flat]
    versions = [t._version for t in given]
    draws = _Draws(model)
    try:
        with torch.no_grad():
            with draws:
                first = [t.clone() for t in pytree.tree_leaves(run(given)) if isinstance(t, torch.Tensor)]
            second = [t for t in pytree.tree_leaves(run([t.clone() for t in flat])) if isinstance(t, torch.Tensor)]
    except Exception:  # noqa: BLE001 - the user's code may raise anything; the failed comparison has its own error
        first = second = []
    written = [p for p, t, v in zip(paths, given, versions, strict=True) if t._version != v]
    if written:
        raise UnsupportedModelError(
            "the model writes to its own input in place",
            where=f"{where}, input {', '.join(written)}",
            got="an input that is another one after the call",
            wanted="a forward that leaves its inputs as they are",
            hint="write x = x - mean for x -= mean, or begin the forward with x = x.clone()",
        )
    pairs = [(a.double(), b.double()) for a, b in zip(first, second, strict=False) if a.shape == b.shape and a.numel()]
    off = max((float((a - b).abs().max() / (b.abs().max() + 1e-6)) for a, b in pairs), default=0.0)
    if off > REPEATED:
        raise UnsupportedModelError(
            "the same input gives another output at every call: the model draws random numbers in eval mode",
            where=where,
            got=f"outputs of two calls that differ by {off:.2g}{draws.found}",
            wanted="one output for one input",
            hint="give F.dropout training=self.training, and add noise only `if self.training:`",
        )
    norms = [n for n, m in model.named_modules() if isinstance(m, _BatchNorm) and m.running_mean is None]
    if norms:
        raise UnsupportedModelError(
            "samples influence one another: batch norm takes the statistics of the batch in eval mode too",
            where=f"{where}, {', '.join(norms)}",
            got="batch norm without running statistics",
            wanted="running statistics, so that rows may leave a batch early",
            hint="build it with track_running_stats=True, and train it",
        )
