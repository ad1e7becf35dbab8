"""Four open exits, no row leaves: the price of heads and decisions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from eecompile.passes import facts
from tests.bench import models
from tests.bench.closed import with_faults
from tests.bench.groups import Context
from tests.bench.models import Subject
from tests.bench.record import Figure, Target, timed


def run(context: Context) -> list[Figure]:
    device = context.device
    if context.small:
        return [price(models.lenet(8, 2, device), Target(10.0), context)]
    subjects = [(models.resnet(64, 4, device), 1.10), (models.bert(8, 128, 4, device, padded=True), 1.05)]
    return [price(subject, Target(bound), context) for subject, bound in subjects]


def price(subject: Subject, target: Target, context: Context) -> Figure:
    fast = subject.fast
    fast.set_thresholds(models.NO_EXIT)
    taken = fast.run(**subject.inputs)
    assert bool((taken.exit_index == len(fast.exits)).all()), taken.exit_index
    heads = head_calls(subject)

    def only_heads() -> None:
        for branch, inputs in heads:
            branch(*inputs)

    calls = {"original": subject.original, "exits open": subject.compiled, "heads alone": only_heads}
    rounds = context.measure(calls)
    figure = timed(subject.name, rounds, "exits open", "original", target)
    share, _ = rounds.ratio("heads alone", "original")
    flops = sum(e.head_flops for e in fast.program.exits) / fast.program.total_flops
    figure.detail = {
        "exits": [e.cut for e in fast.exits],
        "heads": [e.head_kind for e in fast.exits],
        "FLOPs of the heads over the model's": flops,
        "time of the heads over the original's": share,
    }
    with_faults(figure, subject, context)
    if not figure.met:
        figure.cause = (
            f"The heads alone take {share:.1%} of the original's time ({flops:.1%} of its FLOPs); "
            f"page faults a call: {figure.detail.get('page faults a call')}."
        )
    return figure


def head_calls(subject: Subject) -> list[tuple[nn.Module, list[Tensor]]]:
    """Each head with tensors of the shapes that it gets."""
    fast = subject.fast
    signature = fast.program.signature
    batch, nodes = facts.Batch(fast.graph_module, signature), facts.by_name(fast.graph_module)
    sizes: dict[int | str, int] = {}
    for leaf in signature.inputs:
        sizes |= zip(leaf.shape, subject.inputs[leaf.path].shape, strict=True)
    found = []
    for e in fast.program.exits:
        given = []
        for name in e.head_inputs:
            shape = [sizes.get(s, s) if isinstance(s, str) else s for s in batch.sizes(nodes[name])]
            real = subject.inputs.get(name)
            given.append(torch.randn(shape, device=subject.device) if real is None else real)
        found.append((fast.branch(e.name), given))
    return found
