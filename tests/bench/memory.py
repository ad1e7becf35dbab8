"""Memory: parameters are shared with the original, and a call needs no more than the original's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from eecompile.runtime.runnable import EagerSegment
from tests.bench import models, saving
from tests.bench.groups import Context
from tests.bench.models import Subject
from tests.bench.record import Figure, Target

AT_MOST = Target(1.1)


def run(context: Context) -> list[Figure]:
    device = context.device
    subjects = [models.lenet(8, 2, device)]
    if not context.small:
        subjects = [models.resnet(64, 4, device), models.bert(8, 128, 4, device, padded=True)]
    figures = []
    for subject in subjects:
        figures += [*peaks(subject, device), parameters(subject)]
    if not context.small:
        mixed = saving.subject(context, 32)
        figures.append(peak(f"{mixed.name}, exit mix 50/25/25", mixed, device))
    return figures


def peaks(subject: Subject, device: torch.device) -> Iterator[Figure]:
    for name, thresholds in (("exits closed", models.CLOSED), ("exits open, no row leaves", models.NO_EXIT)):
        subject.fast.set_thresholds(thresholds)
        yield peak(f"{subject.name}, {name}", subject, device)


def peak(name: str, subject: Subject, device: torch.device) -> Figure:
    with torch.no_grad():
        original, mine = peak_bytes(subject.original, device), peak_bytes(subject.compiled, device)
    figure = Figure(f"peak of {name}", mine / original, "x the memory", target=AT_MOST)
    figure.detail = {"original, MiB": original / 2**20, "rewritten, MiB": mine / 2**20}
    if not figure.met:
        figure.cause = f"{(mine - original) / 2**20:.1f} MiB more than the original's {original / 2**20:.1f} MiB."
    return figure


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """Most memory that torch held at once during a call, beyond what it held before."""
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as seen:
        kept = call()
    del kept
    results: Any = seen.profiler.kineto_results  # type: ignore[union-attr]
    moves = sorted((e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]")
    held = most = 0
    for _, size in moves:
        held += size
        most = max(most, held)
    return most


def parameters(subject: Subject) -> Figure:
    """Bytes of every tensor that the compiled model reaches, heads left out, over the original's."""
    fast, model = subject.fast, subject.model
    own = {t.untyped_storage().data_ptr() for t in _tensors(model)}
    heads = {t.untyped_storage().data_ptr() for t in fast.heads.parameters()}
    more: dict[int, int] = {}
    for t in reached(subject):
        pointer = t.untyped_storage().data_ptr()
        if pointer not in own and pointer not in heads:
            more[pointer] = t.untyped_storage().nbytes()
    base = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(model)}.values())
    figure = Figure(
        f"parameters of {subject.name}, heads left out", 1 + sum(more.values()) / base, "x the memory", target=Target(1.001)
    )
    figure.detail = {"original, MiB": base / 2**20, "beyond, bytes": sum(more.values())}
    if not figure.met:
        figure.cause = f"{sum(more.values())} bytes in {len(more)} tensors that are neither the model's nor a head's."
    return figure


def reached(subject: Subject) -> Iterator[Tensor]:
    """Tensors of every graph that is kept, and what the segments hold."""
    fast = subject.fast
    for module in (fast, fast.program.source, fast.program.graph_module, *(s.graph_module for s in fast.history)):
        yield from _tensors(module)
    for step in fast.engine.chosen.plan(tuple(range(len(fast.exits))), False):  # type: ignore[attr-defined]
        if isinstance(step.call, EagerSegment):
            yield from (entries[name] for entries, name in step.call.entries)


def _tensors(module: torch.nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()
    for part in module.modules():
        yield from (v for v in part.__dict__.values() if isinstance(v, Tensor))
