"""Device code that kernels share: softmax statistics in one pass, criteria, and stable compaction.

A row's statistics over the logits z seen so far, all float32 but `arg`: `top` the largest, `second` the
second largest, `total = sum exp(z - top)`, `moment = sum exp(z - top) (z - top)`, `arg` the lowest index of
the largest (int32), `bad` 1 once a NaN or a +inf was seen. They merge: rescale both sides to the larger
`top`, then add.
"""
# mypy: disable-error-code="no-untyped-def"
# (arguments of device functions have no Python types)

from __future__ import annotations

from eecompile.kernels._triton import HAVE_TRITON, tl, triton

if HAVE_TRITON:

    @triton.jit
    def scaled(x, factor):
        """`x * factor`, where 0 wins over infinities: nothing seen yet adds nothing."""
        return tl.where(x == 0, 0.0, x * factor)

    @triton.jit
    def merge(top_a, second_a, total_a, moment_a, arg_a, top_b, second_b, total_b, moment_b, arg_b):
        """Statistics of a and b together. On a tie the index of a stays: a holds the lower columns."""
        top = tl.maximum(top_a, top_b)
        base = tl.where(top == float("-inf"), 0.0, top)  # -inf - -inf would be NaN
        shift_a, shift_b = top_a - base, top_b - base
        scale_a, scale_b = tl.exp(shift_a), tl.exp(shift_b)
        second = tl.maximum(tl.minimum(top_a, top_b), tl.maximum(second_a, second_b))
        moment = scale_a * (moment_a + scaled(total_a, shift_a)) + scale_b * (moment_b + scaled(total_b, shift_b))
        total = scale_a * total_a + scale_b * total_b
        return top, second, total, moment, tl.where(top_b > top_a, arg_b, arg_a)

    @triton.jit
    def block_statistics(z, columns):
        """Statistics of one block `z` [R, K] of logits at `columns` [K]; -inf outside of the row, no
        NaN."""
        top = tl.max(z, 1)
        arg = tl.argmax(z, 1, tie_break_left=True).to(tl.int32)
        first = tl.min(columns, 0)
        rest = tl.where(columns[None, :] - first == arg[:, None], float("-inf"), z)
        base = tl.where(top == float("-inf"), 0.0, top)
        shifted = z - base[:, None]
        e = tl.exp(shifted)
        moment = tl.sum(tl.where(e > 0, e * shifted, 0.0), 1)
        return top, tl.max(rest, 1), tl.sum(e, 1), moment, first.to(tl.int32) + arg

    @triton.jit
    def row_statistics(pointer, rows, live, stride_row, stride_column, C, temperature, R: tl.constexpr, K: tl.constexpr):
        """Statistics of `rows` [R] (int64) of logits `[n, C]` over `temperature`, K columns at a time."""
        top = tl.full((R,), float("-inf"), tl.float32)
        second = tl.full((R,), float("-inf"), tl.float32)
        total = tl.zeros((R,), tl.float32)
        moment = tl.zeros((R,), tl.float32)
        arg = tl.zeros((R,), tl.int32)
        bad = tl.zeros((R,), tl.int32)
        for start in range(0, C, K):
            columns = start + tl.arange(0, K)
            inside = live[:, None] & (columns < C)[None, :]
            at = rows[:, None] * stride_row + columns.to(tl.int64)[None, :] * stride_column
            z = tl.load(pointer + at, mask=inside, other=float("-inf")).to(tl.float32)
            z = tl.where(inside, z / temperature, float("-inf"))
            broken = (z != z) | (z == float("inf"))
            bad = tl.maximum(bad, tl.max(broken.to(tl.int32), 1))
            z = tl.where(broken, float("-inf"), z)
            top_b, second_b, total_b, moment_b, arg_b = block_statistics(z, columns)
            top, second, total, moment, arg = merge(
                top, second, total, moment, arg, top_b, second_b, total_b, moment_b, arg_b
            )
        return top, second, total, moment, arg, bad

    @triton.jit
    def criterion_value(top, second, total, moment, bad, C, CRITERION: tl.constexpr):
        """Confidence of a stateless criterion from a row's statistics; NaN where the row cannot be read."""
        if CRITERION == "max_probability":
            value = 1.0 / total
        elif CRITERION == "entropy":
            span = tl.log(tl.maximum(C, 2).to(tl.float32))  # C == 1: H is 0, whatever it is divided by
            value = 1.0 - (tl.log(total) - moment / total) / span
        elif CRITERION == "margin":
            value = (1.0 - tl.exp(second - top)) / total
        elif CRITERION == "energy":
            u = top + tl.log(total) - tl.log(C.to(tl.float32))
            value = 0.5 + 0.5 * (u / (1.0 + tl.abs(u)))
        else:
            tl.static_assert(CRITERION == "learned", "unknown criterion")
            value = 1.0 / (1.0 + tl.exp(-top))
        value = tl.minimum(tl.maximum(value, 0.0), 1.0)
        return tl.where((bad > 0) | (top == float("-inf")), float("nan"), value)

    @triton.jit
    def agreement(previous, count, arg, top, bad, patience):
        """Patience: confidence, class and count after this exit. `previous`, `count` int64."""
        usable = (bad == 0) & (top != float("-inf"))
        count = tl.where(arg.to(tl.int64) == previous, count + 1, 1)
        value = tl.minimum(count.to(tl.float32) / patience.to(tl.float32), 1.0)
        value = tl.where(usable, value, float("nan"))
        return value, tl.where(usable, arg.to(tl.int64), -1), tl.where(usable, count, 0)

    @triton.jit
    def confidence_of_rows(
        logits,
        temperatures,
        state,
        i,
        row,
        live,
        opened,
        stride_row,
        stride_column,
        C,
        exit,
        patience,
        CRITERION: tl.constexpr,
        R: tl.constexpr,
        K: tl.constexpr,
    ):
        """Confidence at an exit of live rows `i` [R], which are samples `row`. Patience keeps its state per sample, and
        writes it where the exit is `opened`."""
        if CRITERION == "given":
            return tl.load(logits + i * stride_row, mask=live, other=0.0).to(tl.float32)
        temperature = 1.0
        if CRITERION != "patience":
            temperature = tl.load(temperatures + exit)
        top, second, total, moment, arg, bad = row_statistics(
            logits, i, live, stride_row, stride_column, C, temperature, R, K
        )
        if CRITERION == "patience":
            previous = tl.load(state + row * 2, mask=live, other=-1)
            agreed = tl.load(state + row * 2 + 1, mask=live, other=0)
            value, previous, agreed = agreement(previous, agreed, arg, top, bad, patience)
            tl.store(state + row * 2, previous, mask=opened)
            tl.store(state + row * 2 + 1, agreed, mask=opened)
        else:
            value = criterion_value(top, second, total, moment, bad, C, CRITERION)
        return value

    @triton.jit
    def last_block_done(counter, blocks):
        """Whether this block is the last of `blocks` to come here. What the others wrote is then
        visible."""
        tl.debug_barrier()  # every thread of this block has written before one of them says so
        done = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == blocks - 1
        if done:
            tl.store(counter, 0)  # ready for the next launch, which the stream puts after this one
        return done

    @triton.jit
    def compact(flags, rows, positions, survivors, n, capacity, IDENTITY: tl.constexpr, N: tl.constexpr):
        """Stable compaction of `flags` [n] (int32, 0 or 1); gives how many are 1.

        `positions` gets their indices in order, `survivors` what `rows` holds there (the index itself if
        IDENTITY), and both -1 from there up to `capacity`.
        """
        found = tl.zeros((), tl.int32)
        for start in range(0, n, N):
            i = start + tl.arange(0, N)
            inside = i < n
            keep = tl.load(flags + i, mask=inside, other=0, cache_modifier=".cg")
            at = found + tl.cumsum(keep, 0) - keep
            kept = inside & (keep > 0)
            row = i.to(tl.int64)
            if not IDENTITY:
                row = tl.load(rows + i, mask=kept, other=0)
            tl.store(positions + at, i.to(tl.int64), mask=kept)
            tl.store(survivors + at, row, mask=kept)
            found += tl.sum(keep, 0)
        for start in range(0, capacity, N):
            i = start + tl.arange(0, N)
            tail = (i >= found) & (i < capacity)
            tl.store(positions + i, tl.full((N,), -1, tl.int64), mask=tail)
            tl.store(survivors + i, tl.full((N,), -1, tl.int64), mask=tail)
        return found

    @triton.jit
    def bucket_of(count, buckets, K, MAX: tl.constexpr):
        """Index of the smallest of the K ascending `buckets` that holds `count`; K, one past the end, for
        0."""
        i = tl.arange(0, MAX)
        size = tl.load(buckets + i, mask=i < K, other=2147483647)
        index = tl.sum((size < count).to(tl.int32), 0)
        return tl.where(count > 0, tl.minimum(index, K - 1), K)
