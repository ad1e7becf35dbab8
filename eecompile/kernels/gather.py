"""Rows of several live tensors to where the next stage wants them, and back: copies, bit for bit, of any
dtype.

`gather`: with b rows in a destination along its batch axis and L = `live[0]` survivors,

    destination[r] = source[positions[min(r, L - 1)]]        for r = 0 .. b - 1, nothing at all if L is 0

so the rows that fill up a bucket repeat the last survivor: whatever a stage computes with them is finite
where it is finite for real rows. `scatter` is the way back: `destination[rows[r]] = source[r]` for r < L,
other rows keep what they hold. `rows` are distinct.

Shapes: source `[.., n, ..]`, destination `[.., b, ..]`, equal but for the batch axis. Nothing is computed,
so ties and NaN do not arise: payloads of NaN and the sign of zero survive. The kernel moves words of 8, 4,
2 or 1 bytes, the widest that both layouts allow, and up to four tensors in one launch.
"""
# mypy: disable-error-code="no-untyped-def"
# (arguments of device functions have no Python types)

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from eecompile.errors import StrategyError
from eecompile.kernels._triton import HAVE_TRITON, LAUNCHES, power_of_2, runs_on, tl, triton

GROUP = 4
"""Tensors that share a launch: at batch sizes where early exit pays, a launch costs more than the copy."""

# --- definition -----------------------------------------------------------------------------------


def gather(
    sources: Sequence[Tensor],
    destinations: Sequence[Tensor],
    positions: Tensor,
    live: Tensor,
    batch_axes: Sequence[int],
) -> None:
    """The definition, in plain torch, without a value on the host.

    Args:
        sources: Live tensors `[.., n, ..]`, any dtype.
        destinations: Buffers `[.., b, ..]`, written; none overlaps a source.
        positions: `[capacity]` int64: where in the sources each survivor lies, as `decide` leaves it.
        live: `[1]` int32 or more; the first element is L.
        batch_axes: One axis per tensor.

    Raises:
        StrategyError: Shapes or dtypes that do not fit.
    """
    check(sources, destinations, batch_axes)
    count = live[:1].long()
    for source, destination, axis in zip(sources, destinations, batch_axes, strict=True):
        r = torch.arange(destination.shape[axis], device=source.device)
        at = positions.index_select(0, torch.minimum(r, count - 1).clamp_min(0)).clamp_min(0)
        destination.copy_(torch.where(count > 0, source.index_select(axis, at), destination))


def scatter(
    sources: Sequence[Tensor],
    destinations: Sequence[Tensor],
    rows: Tensor,
    live: Tensor,
    batch_axes: Sequence[int],
) -> None:
    """The definition of the way back; arguments as for `gather`, with `rows` of the destinations."""
    check(sources, destinations, batch_axes)
    for source, destination, axis in zip(sources, destinations, batch_axes, strict=True):
        size, total = source.shape[axis], destination.shape[axis]
        r = torch.arange(size, device=source.device)
        to = torch.where(r < live[0], rows[:size], total)
        writer = torch.full((total + 1,), -1, device=source.device, dtype=torch.int64)
        writer = writer.scatter_(0, to, r)[:total]
        written = (writer >= 0).view(-1, *(1,) * (source.ndim - axis - 1))
        destination.copy_(torch.where(written, source.index_select(axis, writer.clamp_min(0)), destination))


def check(sources: Sequence[Tensor], destinations: Sequence[Tensor], batch_axes: Sequence[int]) -> None:
    """Raises `StrategyError` unless every destination is a source but for the number of rows."""
    if not len(sources) == len(destinations) == len(batch_axes):
        raise StrategyError(
            "every source needs a destination and a batch axis",
            got=f"{len(sources)}, {len(destinations)}, {len(batch_axes)}",
        )
    for k, (s, d, axis) in enumerate(zip(sources, destinations, batch_axes, strict=True)):
        same = s.dtype == d.dtype and s.ndim == d.ndim and 0 <= axis < s.ndim
        if not same or s.shape[:axis] != d.shape[:axis] or s.shape[axis + 1 :] != d.shape[axis + 1 :]:
            raise StrategyError(
                "a buffer does not fit the tensor that it is for",
                where=f"tensor {k}, batch axis {axis}",
                got=f"{d.dtype} {list(d.shape)}",
                wanted=f"{s.dtype} {list(s.shape)}, but for that axis",
            )


# --- kernel ---------------------------------------------------------------------------------------

if HAVE_TRITON:

    @triton.jit
    def move_one(source, destination, shape, index, L, SCATTER: tl.constexpr, BLOCK: tl.constexpr):
        """One block of one row. `shape`: (rows, inner, outer, strides of outer and row, source then
        destination)."""
        rows, inner, outer, source_outer, source_row, destination_outer, destination_row = shape
        blocks = tl.cdiv(inner, BLOCK)
        pid = tl.program_id(0).to(tl.int64)
        r = (pid // blocks) % rows
        o = pid // blocks // rows
        if (o < outer) & (L > 0):
            if SCATTER:
                to, at = tl.load(index + tl.minimum(r, L - 1)), r
            else:
                to, at = r, tl.load(index + tl.minimum(r, L - 1))
            word = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
            mask = word < tl.where(SCATTER & (r >= L), 0, inner)
            x = tl.load(source + o * source_outer + at * source_row + word, mask=mask)
            tl.store(destination + o * destination_outer + to * destination_row + word, x, mask=mask)

    @triton.jit
    def move_kernel(sources, destinations, shapes, index, live, SCATTER: tl.constexpr, BLOCK: tl.constexpr):
        """Tensor `program_id(1)` of the group."""
        L = tl.load(live).to(tl.int64)
        for k in tl.static_range(len(sources)):
            if tl.program_id(1) == k:
                move_one(sources[k], destinations[k], shapes[k], index, L, SCATTER, BLOCK)


# --- launch ---------------------------------------------------------------------------------------


def rows_of(x: Tensor, axis: int) -> Tensor | None:
    """`x` as `[outer, rows, inner]` with unit stride inside, sharing memory; None where its strides forbid
    it."""
    shape = (math.prod(x.shape[:axis]), x.shape[axis], math.prod(x.shape[axis + 1 :]))
    try:
        view = x.view(shape)
    except RuntimeError:
        return None
    return view if shape[2] == 1 or view.stride(2) == 1 else None


def as_words(views: Sequence[Tensor]) -> list[Tensor]:
    """Views `[outer, rows, inner]` of one dtype, reinterpreted as the widest integers that all of them
    allow."""
    size = views[0].element_size()
    for width, dtype in ((8, torch.int64), (4, torch.int32), (2, torch.int16), (1, torch.uint8)):
        ratio = width // size
        if ratio < 1:
            if size > 8:  # complex128: two words per element
                return [torch.view_as_real(v).flatten(2).view(torch.int64) for v in views]
            continue
        if ratio == 1 or all(
            v.shape[2] % ratio == 0
            and v.stride(2) == 1
            and all(n % ratio == 0 for n in (v.storage_offset(), v.stride(0), v.stride(1)))
            for v in views
        ):
            return [v.view(dtype) for v in views]
    return list(views)


def _launch(
    name: str,
    sources: Sequence[Tensor],
    destinations: Sequence[Tensor],
    index: Tensor,
    live: Tensor,
    batch_axes: Sequence[int],
) -> None:
    check(sources, destinations, batch_axes)
    pairs = []
    for k, (source, destination, axis) in enumerate(zip(sources, destinations, batch_axes, strict=True)):
        if not source.numel() or not destination.numel():
            continue
        to, of = rows_of(destination, axis), rows_of(source, axis)
        if to is None:
            raise StrategyError(
                "a buffer must be contiguous on both sides of its batch axis",
                where=f"tensor {k}, batch axis {axis}",
                got=f"strides {list(destination.stride())}",
            )
        if of is None:  # a layout that cannot be addressed by row: one copy more
            of = rows_of(source.contiguous(), axis)
        pairs.append(as_words([of, to]))  # type: ignore[list-item]
    for start in range(0, len(pairs), GROUP):
        group = pairs[start : start + GROUP]
        # scatter walks over the rows of the source, gather over those of the destination
        walked = [of if name == "scatter" else to for of, to in group]
        block = min(power_of_2(max(v.shape[2] for v in walked)), 1024)
        shapes = tuple(
            (v.shape[1], v.shape[2], v.shape[0], of.stride(0), of.stride(1), to.stride(0), to.stride(1))
            for v, (of, to) in zip(walked, group, strict=True)
        )
        programs = max(v.shape[0] * v.shape[1] * triton.cdiv(v.shape[2], block) for v in walked)
        LAUNCHES[name] += 1
        move_kernel[(programs, len(group))](
            tuple(of for of, _ in group),
            tuple(to for _, to in group),
            shapes,
            index,
            live,
            SCATTER=name == "scatter",
            BLOCK=block,
            enable_fp_fusion=True,
        )


def launch_gather(
    sources: Sequence[Tensor],
    destinations: Sequence[Tensor],
    positions: Tensor,
    live: Tensor,
    batch_axes: Sequence[int],
) -> None:
    """`gather` as one kernel for every four tensors."""
    _launch("gather", sources, destinations, positions, live, batch_axes)


def launch_scatter(
    sources: Sequence[Tensor],
    destinations: Sequence[Tensor],
    rows: Tensor,
    live: Tensor,
    batch_axes: Sequence[int],
) -> None:
    """`scatter` as one kernel for every four tensors."""
    _launch("scatter", sources, destinations, rows, live, batch_axes)


# --- operator -------------------------------------------------------------------------------------


@torch.library.custom_op("eecompile::gather", mutates_args=("destinations",))
def gather_op(
    sources: Sequence[Tensor],
    destinations: Sequence[Tensor],
    positions: Tensor,
    live: Tensor,
    batch_axes: Sequence[int],
) -> None:
    """`gather` as `torch.ops.eecompile.gather`: the kernel where it can run, else the definition."""
    run = launch_gather if runs_on(positions) else gather
    run(sources, destinations, positions, live, batch_axes)


@torch.library.custom_op("eecompile::scatter", mutates_args=("destinations",))
def scatter_op(
    sources: Sequence[Tensor],
    destinations: Sequence[Tensor],
    rows: Tensor,
    live: Tensor,
    batch_axes: Sequence[int],
) -> None:
    """`scatter` as `torch.ops.eecompile.scatter`: the kernel where it can run, else the definition."""
    run = launch_scatter if runs_on(rows) else scatter
    run(sources, destinations, rows, live, batch_axes)


@gather_op.register_fake
@scatter_op.register_fake
def _fake(
    sources: Sequence[Tensor],
    destinations: Sequence[Tensor],
    index: Tensor,
    live: Tensor,
    batch_axes: Sequence[int],
) -> None:
    check(sources, destinations, batch_axes)
