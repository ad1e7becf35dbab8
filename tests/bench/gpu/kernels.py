"""`decide` and `head_confidence` by themselves, at the sizes that the targets name."""

from __future__ import annotations

import torch

import eecompile.ops as ops
from eecompile.kernels._lists import control_size
from eecompile.kernels.head_confidence import head_confidence as definition
from eecompile.measuring import summary
from tests.bench.gpu.cases import Found, Setting
from tests.bench.gpu.platform import Call
from tests.bench.record import Figure, Target

assert ops is not None  # registers torch.ops.eecompile.*
REPEATS = 20  # launches in one graph, so that launching it is not measured
DECISIONS = ((1, 2), (32, 2), (256, 2), (1, 1000), (32, 1000), (256, 1000))
D, V, ROWS = 4096, 128_000, (1, 16, 32)


def run(setting: Setting, found: Found, small: bool = False) -> None:
    for batch, classes in DECISIONS[:2] if small else DECISIONS:
        with found.trying(f"decide: {batch} rows, {classes} classes"), torch.no_grad():
            decide(batch, classes, setting, found)
    with found.trying("head_confidence"), torch.no_grad():
        heads(setting, found, *((64, 500, ROWS[:2]) if small else (D, V, ROWS)))


def dtype_on(device: torch.device) -> torch.dtype:
    return torch.float16 if device.type == "cuda" else torch.float32


def decide(batch: int, classes: int, setting: Setting, found: Found) -> None:
    """A graph of `REPEATS` decisions; half of the rows leave."""
    platform, device = setting.platform, setting.platform.device
    made = torch.Generator().manual_seed(0)
    logits = torch.randn(batch, classes, generator=made).to(device, dtype_on(device))
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

    graph, once = platform.capture(several), platform.capture(lambda: (call(), control)[1:])
    name = f"decide: {batch} rows, {classes} classes"
    flushed = platform.measure({name: once.replay}, setting.rounds, flush=True).median(name)
    seconds = [t / REPEATS for t in platform.measure({name: graph.replay}, setting.rounds).times[name]]
    value, spread = summary([1e6 * s for s in seconds])
    figure = Figure(name, value, "us", spread, len(seconds), Target(6.0))
    figure.detail = {"us as a graph of its own, second-level cache emptied": 1e6 * flushed}
    found.add(figure)


def heads(setting: Setting, found: Found, width: int, vocabulary: int, rows: tuple[int, ...]) -> None:
    """Bytes of the class matrix over the time, as a share of what the memory can do, and what is allocated."""
    platform, device = setting.platform, setting.platform.device
    dtype = dtype_on(device)
    made = torch.Generator(device=device).manual_seed(0)
    weight = torch.randn(vocabulary, width, generator=made, device=device, dtype=dtype) / width**0.5
    one = torch.ones((), device=device)
    sheet, copied = platform.bandwidth()
    for n in rows:
        hidden = torch.randn(n, width, generator=made, device=device, dtype=dtype)

        def call(hidden: torch.Tensor = hidden) -> tuple[torch.Tensor, ...]:
            return tuple(torch.ops.eecompile.head_confidence(hidden, weight, None, one, "max_probability"))

        value, top, _ = call()
        wanted, best, _ = definition(hidden, weight, None, one, "max_probability")
        torch.testing.assert_close(value, wanted, atol=1e-4, rtol=1e-2)
        assert float((top == best).float().mean()) >= 0.9, "the classes differ"  # near ties may go either way
        name = f"head_confidence: {n} rows"
        graph = platform.capture(call)
        plain: Call = lambda hidden=hidden: (hidden @ weight.T).float().softmax(-1).max(-1)  # noqa: E731
        rounds = platform.measure({name: graph.replay, "plain torch": plain}, setting.rounds)
        whole = weight.numel() * weight.element_size()
        share, spread = summary([whole / t / (sheet or copied) for t in rounds.times[name]])
        figure = Figure(name, share, "of the bandwidth", spread, setting.rounds, Target(0.8, "at least"))
        figure.medians_ms = {what: 1e3 * rounds.median(what) for what in rounds.times}
        figure.detail = {"by": "the data sheet" if sheet else "a copy", "data sheet": sheet, "a copy": copied}
        bytes_of_logits = n * vocabulary * dtype.itemsize
        allocated = Figure(f"{name}, memory", platform.peak_bytes(call) / bytes_of_logits, "of the logits")
        if n >= 16:  # a block has 16 rows, so a single one takes the memory of 16
            allocated.target = Target(0.05)
        found.add(figure, allocated)
