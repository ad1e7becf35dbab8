"""`decide` by itself, at the sizes that the targets name."""

from __future__ import annotations

import torch

import eecompile.ops as ops
from eecompile.kernels._lists import control_size
from eecompile.measuring import summary
from tests.bench.gpu.cases import Found, Setting
from tests.bench.record import Figure, Target

assert ops is not None  # registers torch.ops.eecompile.*
REPEATS = 20  # launches in one graph, so that launching it is not measured
DECISIONS = ((1, 2), (32, 2), (256, 2), (1, 1000), (32, 1000), (256, 1000))


def run(setting: Setting, found: Found, small: bool = False) -> None:
    for batch, classes in DECISIONS[:2] if small else DECISIONS:
        with found.trying(f"decide: {batch} rows, {classes} classes"), torch.no_grad():
            decide(batch, classes, setting, found)


def decide(batch: int, classes: int, setting: Setting, found: Found) -> None:
    """A graph of `REPEATS` decisions; half of the rows leave."""
    platform, device = setting.platform, setting.platform.device
    made = torch.Generator().manual_seed(0)
    logits = torch.randn(batch, classes, generator=made).to(device, platform.dtype)
    rows = [torch.zeros(batch, dtype=torch.int64, device=device) for _ in range(3)]
    control = torch.zeros(control_size(batch), dtype=torch.int32, device=device)
    output, confidence = torch.zeros_like(logits), torch.zeros(batch, device=device)
    count = torch.tensor([batch], dtype=torch.int32, device=device)
    buckets = torch.tensor([1 << i for i in range(9)], dtype=torch.int32, device=device)
    best = logits.float().softmax(-1).amax(-1)
    thresholds, temperatures = best.median().view(1).clone(), torch.ones(2, device=device)

    def call() -> None:
        torch.ops.eecompile.decide(
            logits, logits, None, count, thresholds, temperatures, 0, "max_probability", 1, None, buckets,
            output, rows[0], confidence, rows[1], rows[2], control, False, None, None,
        )  # fmt: skip

    call()
    sure = best >= thresholds
    torch.testing.assert_close(confidence[sure], best[sure], atol=1e-3, rtol=0)
    assert torch.equal(output[sure], logits[sure])

    def several() -> tuple[torch.Tensor, ...]:
        for _ in range(REPEATS):
            call()
        return (control,)

    graph = platform.capture(several)
    name = f"decide: {batch} rows, {classes} classes"
    seconds = [t / REPEATS for t in platform.measure({name: graph.replay}, setting.rounds).times[name]]
    value, spread = summary([1e6 * s for s in seconds])
    found.add(Figure(name, value, "us", spread, len(seconds), Target(6.0)))
