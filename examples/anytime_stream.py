"""Anytime answers of ResNet-20 on CIFAR-10: a stream, deadlines and how well they are kept.

Heads are put everywhere that pays and fitted to labels and to the model's own output; the model stays as it is. How the
exits answer, each for itself or together, is chosen on the validation part. Then, on the test part: how the answer gets
better along a stream and when each comes; and a sweep over deadlines, one image a call, on an idle machine and next to a
second process that keeps one core busy: accuracy, how far calls get, how late they are.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from eecompile import CompiledModule, eecompile
from eecompile.kernels.combine import COMBINATIONS, ensemble, keep_best
from eecompile.measuring import busy
from eecompile.strategies import Anytime
from eecompile.training.head_choice import with_kinds
from eecompile.training.head_report import HeadRow
from examples import datasets
from examples._common import (
    Observed,
    Options,
    Record,
    Variant,
    alternatives,
    by_exit,
    fitted,
    main,
    observed,
    resnet_trunk,
    rows_in,
    rows_of,
    timed,
)

TRAIN, VAL, TEST = 6_000, 1_000, 2_000
STREAMS, CALLS, DEADLINES = 100, 250, 7
SIZES = (1, 32, 64)
LATE = 1.05  # a call is late that takes more than this times its deadline


def example(options: Options, record: Record) -> None:
    """From training to the sweep."""
    quick = options.quick
    limits = {"train": None, "val": None, "test": None} if quick else {"train": TRAIN, "val": VAL, "test": TEST}
    parts = {
        part: datasets.loader(f"cifar10:{part}", batch_size=32, limit=limits[part], standin=quick, seed=options.seed)
        for part in datasets.PARTS
    }
    base = resnet_trunk(quick=quick, seed=options.seed)
    x = next(iter(parts["test"]))[0][:8]
    fast = eecompile(base.model, Anytime(), example_inputs=(x,))
    fit = fitted(fast, parts["train"], "anytime-resnet", options, base, heads={})
    sizes = {part: rows_in(loader) for part, loader in parts.items()}
    exits = [{"name": e.name, "after": e.cut, "head": e.head_kind, "depth": e.depth} for e in fast.exits]
    record.note(rows_of_data=sizes, trunk=base.to_dict(), fit=fit, exits=exits)
    record.done("train")

    seen = observed(fast, {part: parts[part] for part in ("val", "test")})
    right = {how: {part: right_at(found, how) for part, found in seen.items()} for how in COMBINATIONS}
    chosen = max(COMBINATIONS, key=lambda how: statistics.mean(right[how]["val"]))
    accuracies = {"original_accuracy": base.accuracy, "full_accuracy": right[chosen]["test"][-1]}
    costs = fast.costs([True] * len(fast.exits)).tolist()
    record.note(accuracy_by_exit=right, chosen=chosen, cost_by_exit=costs)
    constants = by_exit(fast, right[chosen]["test"])
    interrupted = []
    for k in range(0, len(fast.exits), (len(fast.exits) - 1) // 2 or 1):
        accuracy, cost = right[chosen]["test"][k], costs[k]  # every head up to there was computed
        figures = {**accuracies, "accuracy": accuracy, "cost": cost, **alternatives(constants, cost)}
        after = f"after {fast.exits[k].name}"
        interrupted.append((record.row("ResNet-20, CIFAR-10, interrupted", thresholds=after, **figures), k))
    record.done("evaluate")

    together = eecompile(base.model, Anytime(combine=chosen), example_inputs=(x,))
    with_kinds(together, [HeadRow(**row) for row in fit["heads"]])
    together.heads.load_state_dict(fast.heads.state_dict())  # each is trained for itself, whatever they answer together
    together.settings = fast.settings
    fast = together
    variants = [Variant(row, partial(until, fast, k)) for row, k in interrupted]
    timed(record, base.model, rows_of(parts["test"], 4), variants, SIZES)
    images, labels = datasets.load("cifar10", "test", limits["test"], standin=quick).tensors
    with torch.no_grad():
        record.note(stream=streamed(fast, images[: 8 if quick else STREAMS]))
        fast.measure_stages(images[:1], rounds=40)
        lowest, full = first_and_last(fast)
        steps = 3 if quick else DEADLINES
        deadlines = [round(1e3 * (lowest + (full - lowest) * k / (steps - 1)), 2) for k in range(steps)]
        swept: dict[str, list[dict[str, Any]]] = {}
        for load in ("idle", "one core busy"):
            with busy() if load != "idle" else contextlib.nullcontext():
                swept[load] = [sweep(fast, images, labels, d, 12 if quick else CALLS) for d in deadlines]
        record.note(sweep=swept, stage_times=fast.stage_times.to_dict())
    for key in ("late", "late_after_a_later_exit"):
        record.note(**{key: {load: statistics.mean(point[key] for point in points) for load, points in swept.items()}})
    for load, points in swept.items():
        for point in points[:: (len(points) - 1) // 2]:  # the record has all
            record.row(
                f"ResNet-20, CIFAR-10, {load}",
                thresholds=f"deadline {point['deadline_ms']:.3g} ms",
                **accuracies,
                accuracy=point["accuracy"],
                cost=point["cost"],
                **alternatives(constants, point["cost"]),
            )


def until(fast: CompiledModule, k: int, x: Tensor) -> Any:
    """The answer of exit k, at which the stream is left."""
    return next(islice(fast.stream(x), k, None))


def right_at(seen: Observed, how: str) -> list[float]:
    """Accuracy if every row stopped at an exit, for each and, last, the model; from what every head said by itself."""
    found, state = [], None
    *heads, model = seen.outputs.unbind(1)
    for logits in heads:
        if how == "ensemble":
            logits, state = ensemble(logits, state)
        elif how == "confident":
            logits, _, state = keep_best(logits, logits.softmax(1).amax(1), state)
        found.append(logits)
    return [float((logits.argmax(1) == seen.labels).float().mean()) for logits in (*found, model)]


def streamed(fast: CompiledModule, images: Tensor) -> list[dict[str, Any]]:
    """When each answer of a stream comes, one image at a time: median milliseconds, mean confidence, by exit."""
    times: dict[int, list[float]] = {}
    sure: dict[int, list[float]] = {}
    for i in range(len(images)):
        started = time.perf_counter()
        for r in fast.stream(images[i : i + 1]):
            at = int(r.exit_index)
            times.setdefault(at, []).append(1e3 * (time.perf_counter() - started))
            sure.setdefault(at, []).append(float(r.confidence))
    names = [*(e.name for e in fast.exits), "model"]
    return [
        {"exit": names[k], "milliseconds": statistics.median(times[k]), "confidence": statistics.mean(sure[k])}
        for k in sorted(times)
    ]


def first_and_last(fast: CompiledModule) -> tuple[float, float]:
    """Seconds that the first exit safely takes, and a little more than the whole model does; as measured just now."""
    pieces = {(p["from"], p["to"]): p for p in fast.stage_times.to_dict()}
    end = pieces.pop((-2, -2))["predicted_ms"]
    first = pieces[(-1, 0)]["predicted_ms"]
    whole = sum(p["median_ms"] for p in pieces.values())
    lowest = 1.5e-3 * (first + end)
    return lowest, max(1.3e-3 * whole, 2 * lowest)


def sweep(fast: CompiledModule, images: Tensor, labels: Tensor, deadline: float, calls: int) -> dict[str, Any]:
    """Single images under one deadline: accuracy, cost, and how late calls are."""
    right, cost, over, depth, beyond = 0, 0.0, [], 0.0, 0
    for i in range(calls):
        x = images[i % len(images)][None]
        started = time.perf_counter()
        r = fast.run(x, deadline_ms=deadline)
        over.append((time.perf_counter() - started) * 1e3 / deadline)
        right += int(r.output.argmax(1)) == int(labels[i % len(images)])
        cost += float(r.cost) / calls
        depth += float(r.exit_index) / calls
        beyond += int(r.exit_index) > 0 and over[-1] > LATE
    over.sort()
    at = {f"p{q}": over[min(int(q / 100 * calls), calls - 1)] for q in (50, 90, 95, 98, 99)}
    return {
        "accuracy": right / calls,
        "cost": cost,
        "mean_exit": depth,
        "late": sum(o > LATE for o in over) / calls,
        "late_after_a_later_exit": beyond / calls,  # the others' first exit itself came too late
        "time_over_deadline": {**at, "max": over[-1]},
        "calls": calls,
        "deadline_ms": deadline,
    }


if __name__ == "__main__":
    main("anytime_stream", __doc__, example)
