"""Is the captured graph the model? Numbers at batch 1, 2, 3 and B, another length, and rows alone against the batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from eecompile.errors import CaptureError, UnsupportedModelError
from eecompile.signature import Signature

TOLERANCE = 1e-4  # relative to the largest value; a burned-in branch is off by far more


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference relative to the largest finite value; inf where shapes or non-finite values differ."""
    if a.shape != b.shape:
        return float("inf")
    if a.numel() == 0:
        return 0.0
    if not (a.is_floating_point() or a.is_complex()):
        return 0.0 if torch.equal(a, b) else float("inf")
    x, y = a.double(), b.double()
    finite = torch.isfinite(y)
    if not torch.equal(finite, torch.isfinite(x)):
        return float("inf")
    if not bool(finite.any()):
        return 0.0
    x, y = x[finite], y[finite]
    return float((x - y).abs().max() / (y.abs().max() + 1e-6))


def rows(signature: Signature, flat: Sequence[torch.Tensor], index: Sequence[int]) -> list[torch.Tensor]:
    """The given rows of every input that has a batch; rows repeat where the example is short."""
    size = signature.batch_size(flat)
    pick = torch.tensor([i % size for i in index], device=flat[0].device)
    return [
        t if leaf.batch_axis is None else t.index_select(leaf.batch_axis, pick)
        for t, leaf in zip(flat, signature.inputs, strict=True)
    ]


def shorter(signature: Signature, flat: Sequence[torch.Tensor]) -> list[torch.Tensor] | None:
    """The inputs at another size of every further dynamic axis, None where there is no such axis."""
    others = [d for d in signature.dynamic if d != "batch"]
    if not others:
        return None
    out = []
    for t, leaf in zip(flat, signature.inputs, strict=True):
        for axis, size in enumerate(leaf.shape):
            if size in others:
                t = t.narrow(axis, 0, max(2, t.shape[axis] * 2 // 3))
        out.append(t)
    return out


def verify(
    signature: Signature,
    flat: Sequence[torch.Tensor],
    graph: Callable[..., Sequence[torch.Tensor]],
    model: Callable[[Sequence[torch.Tensor]], Any],
    where: str,
) -> list[str]:
    """Compares graph and model; gives the problems, empty if there is none.

    Args:
        flat: Example inputs of at least two rows.
        graph: Flat tensors to flat outputs.
        model: Flat tensors to the model's own output.

    Raises:
        UnsupportedModelError: A row's output depends on the other rows of its batch.
    """
    size = signature.batch_size(flat)
    problems: list[str] = []
    outputs: dict[int, list[torch.Tensor]] = {}
    with torch.no_grad():
        for n in sorted({1, 2, 3, size}):
            batch = rows(signature, flat, range(n))
            want = signature.flatten_output(model(batch))
            outputs[n] = want
            problems += _compare(graph, batch, want, f"batch {n}")
        other = shorter(signature, flat)
        if other is not None:
            try:
                want = signature.flatten_output(model(other))
            except (RuntimeError, IndexError, ValueError):  # the model itself has one length only
                problems.append("another length: the model itself refuses it")
            else:
                problems += _compare(graph, other, want, "another length")
        alone = signature.flatten_output(model(rows(signature, flat, [1])))
    independent(signature, outputs[size], alone, 1, where)
    return problems


def _compare(
    graph: Callable[..., Sequence[torch.Tensor]],
    batch: Sequence[torch.Tensor],
    want: Sequence[torch.Tensor],
    what: str,
) -> list[str]:
    try:
        got = graph(*batch)
    except (RuntimeError, AssertionError, ValueError, IndexError) as error:  # guards raise any of these
        return [f"{what}: {type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}"]
    if len(got) != len(want):
        return [f"{what}: {len(got)} outputs instead of {len(want)}"]
    worst = max((difference(a, b) for a, b in zip(got, want, strict=True)), default=0.0)
    return [] if worst <= TOLERANCE else [f"{what}: differs from the model by {worst:.2g}"]


def independent(
    signature: Signature, full: Sequence[torch.Tensor], alone: Sequence[torch.Tensor], row: int, where: str
) -> None:
    """Refuses a model whose rows influence one another: compaction would change its answers."""
    for leaf, whole, one in zip(signature.outputs, full, alone, strict=True):
        if leaf.batch_axis is None:
            continue
        worst = difference(one, whole.narrow(leaf.batch_axis, row, 1))
        if worst > 10 * TOLERANCE:
            raise UnsupportedModelError(
                "samples influence one another, so rows may not leave a batch early",
                where=f"{where}, output {leaf.path}",
                got=f"row {row} alone differs from the same row in its batch by {worst:.2g}",
                wanted=f"at most {10 * TOLERANCE:g}",
                hint="look for a mean over the batch axis or batch norm in train mode; compile in eval mode",
            )


def raise_problems(problems: Sequence[str], where: str) -> None:
    if problems:
        raise CaptureError(
            "the captured graph does not compute what the model computes",
            where=where,
            got="; ".join(problems),
            hint='use capture="blocks", or remove the Python branch on the number of rows',
        )
