"""Is the captured graph the model? Numbers at batch 1, 2, 3 and B, another length, and rows alone against the batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from eecompile.capture.axes import without_batch
from eecompile.capture.causes import raise_cause
from eecompile.capture.memory import written_attributes
from eecompile.errors import CaptureError, UnsupportedModelError
from eecompile.signature import Signature

TOLERANCE = 1e-4  # relative to the largest value; a burned-in branch is off by far more
LOOSE = 10 * TOLERANCE  # for a row alone against the same row in a batch: sums may run in another order
Model = Callable[[Sequence[torch.Tensor]], Any]  # flat tensors to the model's own output
Graph = Callable[..., Sequence[torch.Tensor]]  # flat tensors to flat outputs


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
    pick = torch.tensor([i % size for i in index], dtype=torch.int64, device=flat[0].device)
    return [
        t if leaf.batch_axis is None else t.index_select(leaf.batch_axis, pick)
        for t, leaf in zip(flat, signature.inputs, strict=True)
    ]


def at_lengths(signature: Signature, flat: Sequence[torch.Tensor], length: Callable[[int], int]) -> list[torch.Tensor]:
    """The inputs with every further dynamic axis cut (or filled up by repeating) to another length.

    Integers `[B]`, which may be the lengths of the rows, do not exceed it.
    """
    others = set(signature.dynamic) - {"batch"}
    lengths = [
        n
        for t, leaf in zip(flat, signature.inputs, strict=True)
        for n, s in zip(t.shape, leaf.shape, strict=True)
        if s in others
    ]
    out = []
    for t, leaf in zip(flat, signature.inputs, strict=True):
        if t.dim() == 1 and leaf.shape == ("batch",) and t.dtype in (torch.int32, torch.int64) and lengths:
            t = t.clamp(max=length(max(lengths)))
        for axis, size in enumerate(leaf.shape):
            if size in others:
                index = torch.arange(length(t.shape[axis]), device=t.device) % t.shape[axis]
                t = t.index_select(axis, index)
        out.append(t)
    return out


def verify(
    signature: Signature,
    flat: Sequence[torch.Tensor],
    graph: Graph,
    model: Model,
    module: nn.Module,
    guarded: bool = True,
) -> tuple[Signature, list[str], tuple[str, ...]]:
    """Compares graph and model at sizes that the signature admits.

    Args:
        flat: Example inputs of at least two rows.
        graph: Flat tensors to flat outputs.
        model: Flat tensors to the model's own output.
        module: The user's model itself.
        guarded: Whether the trace has a guard where the model branches on a size of 1.

    Returns:
        The signature with the smallest sizes for which graph and model agree, problems (empty if there is none), and what
        could not be checked.

    Raises:
        UnsupportedModelError: A row's output depends on the other rows of its batch.
    """
    size = signature.batch_size(flat)
    where = type(module).__name__
    problems: list[str] = []
    whole: list[torch.Tensor] = []
    with torch.no_grad():
        for n in sorted({1, 2, 3, size}):
            batch = rows(signature, flat, range(n))
            if not signature.admits(batch):
                continue
            try:
                want = signature.flatten_output(model(batch))
            except Exception as error:  # the user's code may raise anything
                raise_cause(model, flat, [leaf.path for leaf in signature.inputs], module, where)
                raise other_rows(signature, batch, error, where) from error
            if n == size:
                whole = want
            problems += compare(graph, batch, want, f"batch {n}")
        if len(signature.dynamic) > 1 and not problems:
            signature, problems = _lengths(signature, flat, graph, model, guarded)
        if not problems and signature.dynamic["batch"][0] == 1:
            empty = rows(signature, flat, [])
            wider = replace(signature, dynamic={**signature.dynamic, "batch": (0, signature.dynamic["batch"][1])})
            if wider.admits(empty) and not _tried(wider, graph, model, empty, "no row"):
                signature = wider
        unknown = independent(signature, flat, model, where, module, whole)
    return signature, problems, unknown


def other_rows(signature: Signature, batch: Sequence[torch.Tensor], error: Exception, where: str) -> CaptureError:
    """The error for a model that runs on the rows of its example and on no other number of rows."""
    axes = [leaf.batch_axis for leaf in signature.inputs]
    return CaptureError(
        "the model fails on another number of rows than its example has",
        where=where,
        got=f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')} "
        f"({', '.join(f'{leaf.path}: {list(t.shape)}' for leaf, t in zip(signature.inputs, batch, strict=True))})",
        wanted="rows on the batch axis of every input that has a batch",
        hint=without_batch([leaf.path for leaf in signature.inputs], batch, axes),
    )


def _lengths(
    signature: Signature, flat: Sequence[torch.Tensor], graph: Graph, model: Model, guarded: bool
) -> tuple[Signature, list[str]]:
    """Compares at a shorter, a longer and the shortest length; one of 1 is left out where they differ there unguarded."""
    others = at_lengths(signature, flat, lambda n: max(2, n * 2 // 3)), at_lengths(signature, flat, lambda n: n + 3)
    problems: list[str] = []
    for inputs in others:
        if signature.admits(inputs):
            problems += _tried(signature, graph, model, inputs, "another length")
            if not guarded:
                problems += _tried(signature, graph, model, rows(signature, inputs, [0]), "another length, batch 1")
    short = at_lengths(signature, flat, lambda n: 1)
    few = [short, *(rows(signature, short, range(n)) for n in (1, 2, 3))]
    if not problems:
        # the model refuses a single token, or torch took a length of 1 for impossible
        if any(signature.admits(t) and _tried(signature, graph, model, t, "length 1") for t in few):
            dynamic = {n: (low if n == "batch" else max(low, 2), high) for n, (low, high) in signature.dynamic.items()}
            signature = replace(signature, dynamic=dynamic)
    return signature, problems


def _tried(signature: Signature, graph: Graph, model: Model, inputs: Sequence[torch.Tensor], what: str) -> list[str]:
    """The problems at these inputs; that the model itself refuses them is one."""
    try:
        want = signature.flatten_output(model(inputs))
    except Exception:  # noqa: BLE001 - the user's code may raise anything
        return [f"{what}: the model itself refuses it"]
    return compare(graph, inputs, want, what)


def compare(
    graph: Graph,
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
    signature: Signature,
    flat: Sequence[torch.Tensor],
    model: Model,
    where: str,
    module: nn.Module,
    whole: Sequence[torch.Tensor] | None = None,
) -> tuple[str, ...]:
    """Refuses a model whose rows influence one another: compaction would change its answers.

    Args:
        module: The user's model itself.
        whole: The model's output on `flat`, where it is known.

    Returns:
        What could not be checked, as a note.

    Raises:
        UnsupportedModelError: A row by itself gets another answer than in its batch.
    """
    varied = _varied(signature, flat)
    if varied is None:
        return ("not checked: whether samples influence one another, since all rows of the example are the same",)

    def run(index: Sequence[int]) -> list[torch.Tensor]:
        batch = rows(signature, varied, index)
        try:
            return signature.flatten_output(model(batch))
        except Exception as error:  # the user's code may raise anything
            raise other_rows(signature, batch, error, where) from error

    size = signature.batch_size(flat)
    with torch.no_grad():
        full = whole if whole is not None and varied is flat else run(range(size))
        one = [1] if signature.dynamic["batch"][0] <= 2 and signature.admits(rows(signature, varied, [1])) else [1] * size
        alone = run(one)
        for i, leaf in enumerate(signature.outputs):
            if leaf.batch_axis is None:
                continue
            mine = full[i].narrow(leaf.batch_axis, 1, 1)
            worst = difference(alone[i].narrow(leaf.batch_axis, 0, 1), mine)
            if worst <= LOOSE:
                continue
            raise_cause(model, varied, [leaf.path for leaf in signature.inputs], module, where)
            few = 2 if size > 2 else 3
            among = run([0, 1, 0][:few])[i].narrow(leaf.batch_axis, 1, 1)
            if one == [1] and difference(among, mine) <= TOLERANCE:
                raise UnsupportedModelError(
                    "the model computes something else for a batch of one row, so rows may not leave a batch early",
                    where=f"{where}, output {leaf.path}",
                    got=f"row 1 alone differs by {worst:.2g} from the same row in batches of {few} and {size}",
                    wanted=f"at most {LOOSE:g}",
                    hint="look for a branch on the number of rows, such as `if x.shape[0] > 1`, or a squeeze()",
                )
            raise UnsupportedModelError(
                "samples influence one another, so rows may not leave a batch early",
                where=f"{where}, output {leaf.path}",
                got=f"row 1 alone differs from the same row in its batch by {worst:.2g}",
                wanted=f"at most {LOOSE:g}",
                hint="look for a mean over the batch axis, batch norm in train mode (compile in eval mode), or activations "
                "quantized with one scale for the whole batch (PT2E with is_dynamic=True: take static scales)",
            )
    return ()


def _varied(signature: Signature, flat: Sequence[torch.Tensor]) -> Sequence[torch.Tensor] | None:
    """The example with rows that differ: equal rows (zeros, ones) would hide a mean over the batch.

    Noise goes on floating-point inputs where all rows are equal; None where there is none to put it on.
    """
    batched = [(t, leaf.batch_axis) for t, leaf in zip(flat, signature.inputs, strict=True) if leaf.batch_axis is not None]
    if any(not torch.equal(t, t.narrow(a, 0, 1).expand_as(t)) for t, a in batched):
        return flat
    if not any(t.is_floating_point() for t, _ in batched):
        return None
    generator = torch.Generator().manual_seed(0)

    def noisy(t: torch.Tensor) -> torch.Tensor:
        return t + torch.randn(t.shape, generator=generator).to(t)

    return [
        noisy(t) if leaf.batch_axis is not None and t.is_floating_point() else t
        for t, leaf in zip(flat, signature.inputs, strict=True)
    ]


def fused_attention(
    signature: Signature,
    flat: Sequence[torch.Tensor],
    graph: Callable[..., Any],
    run: Model,
    model: nn.Module,
    enabled: bool,
) -> None:
    """Compares once more with torch's fused attention, which a model may use in eval mode and which cannot be captured.

    Raises:
        CaptureError: It gives other numbers: with nested tensors it puts zeros where a padding mask is set.
    """
    kinds = nn.TransformerEncoder | nn.TransformerEncoderLayer | nn.MultiheadAttention
    if not enabled or not any(isinstance(m, kinds) for m in model.modules()):
        return
    try:
        torch.backends.mha.set_fastpath_enabled(True)
        with torch.no_grad():
            want = signature.flatten_output(run(flat))
    finally:
        torch.backends.mha.set_fastpath_enabled(False)
    with torch.no_grad():
        got = signature.flatten_output(graph(*flat))
    worst = max((difference(a, b) for a, b in zip(got, want, strict=True)), default=0.0)
    if worst > LOOSE:
        raise CaptureError(
            "the model gives other numbers through torch's fused attention, which cannot be captured",
            where=type(model).__name__,
            got=f"a difference of {worst:.2g}; the fused path zeroes padded positions, and the model reads them",
            wanted=f"at most {LOOSE:g}",
            hint="build nn.TransformerEncoder(..., enable_nested_tensor=False), leave padded positions out of what "
            "follows, or switch the path off everywhere: torch.backends.mha.set_fastpath_enabled(False)",
        )


def raise_problems(problems: Sequence[str], where: str) -> None:
    if problems:
        raise CaptureError(
            "the captured graph does not compute what the model computes",
            where=where,
            got="; ".join(problems),
            hint='use capture="blocks", or remove the Python branch on the number of rows',
        )


def writes_nothing(graph_module: fx.GraphModule) -> None:
    """Refuses a model that writes its own buffers in eval mode: rows that left would not be in what is written.

    Raises:
        UnsupportedModelError: With the names of the buffers.
    """
    names = written_attributes(graph_module)
    if names:
        raise UnsupportedModelError(
            "the model writes its own buffers in eval mode",
            where=", ".join(names),
            got="a state that moves on with every call, from the rows of the whole batch",
            wanted="a forward that leaves buffers as they are in eval mode: rows that left early are in no later layer",
            hint="write them in train mode only (if self.training: ...)",
        )
