"""`fast.benchmark(example)`: measured time against the original, all in one run, interleaved."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from rich.console import RenderableType
from torch import Tensor

from eecompile.capture.adapter import mode
from eecompile.errors import EecompileError
from eecompile.measuring import interleaved, rounds_of, summary
from eecompile.plain import check_callable, check_kind, check_number
from eecompile.training.report import Report, json_safe, table

if TYPE_CHECKING:
    from eecompile.module import CompiledModule


@dataclass
class BenchmarkReport(Report):
    """Times in seconds per call: median and spread (half the interquartile range) over the rounds.

    Attributes:
        others: Median share of the machine that other processes took meanwhile; None where it is unknown.
    """

    title: ClassVar[str] = "benchmark"

    batch: int
    threads: int
    rounds: int
    rows: list[dict[str, Any]]
    exit_share: dict[str, float] = field(default_factory=dict)
    mean_cost: float = 1.0
    others: float | None = None

    def to_dict(self) -> dict[str, Any]:
        safe: dict[str, Any] = json_safe(
            {
                "batch": self.batch,
                "threads": self.threads,
                "rounds": self.rounds,
                "rows": self.rows,
                "exit_share": self.exit_share,
                "mean_cost": self.mean_cost,
                "others": self.others,
            }
        )
        return safe

    def ratio(self, name: str, against: str = "original") -> float:
        """Median time of one over the other's."""
        times = {r["name"]: r["median_s"] for r in self.rows}
        return float(times[name] / times[against])

    def __rich__(self) -> RenderableType:
        busy = "" if (self.others or 0.0) < 0.05 else f"; other processes took {self.others:.0%} of the machine"
        made = table(
            f"batch {self.batch}, {self.threads} threads, median of {self.rounds} interleaved rounds; "
            f"mean cost {self.mean_cost:.1%} of the model's FLOPs{busy}",
            ["what", "ms a call", "spread", "against the original"],
            [
                [r["name"], f"{1e3 * r['median_s']:.3f}", f"{1e3 * r['spread_s']:.3f}", f"{r['ratio']:.3f}x the time"]
                for r in self.rows
            ],
        )
        return made


def as_call(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """One example as arguments: a tensor, a tuple, or a dict of keyword arguments without its labels."""
    if isinstance(example, Tensor):
        return (example,), {}
    if isinstance(example, Mapping):
        return (), {k: v for k, v in example.items() if k != "labels"}
    if isinstance(example, list | tuple):
        return tuple(example), {}
    raise EecompileError("an example is a tensor, a tuple or a dict of keyword arguments", got=type(example).__name__)


def benchmark(
    fast: CompiledModule,
    example: Any,
    *,
    rounds: int = 9,
    compile_original: bool = False,
    original: Any = None,
    against: Mapping[str, Callable[[], Any]] | None = None,
) -> BenchmarkReport:
    """Time of `fast(example)` against the original under eager and, where asked, under `torch.compile`.

    Args:
        example: A tensor, a tuple, or a dict of keyword arguments, with a batch of any size.
        rounds: Interleaved rounds; the median counts. At least 3.
        compile_original: Also measure the original under `torch.compile`.
        original: The model to compare with, where `fast` was loaded from a file.
        against: Further rivals, by name.

    Raises:
        EecompileError: Too few rounds, or an example of no known form.
    """
    check_number("rounds", rounds, least=3, whole=True)
    if original is not None:
        check_kind("original", original, torch.nn.Module, "the model that was compiled")
    if against is not None:
        check_kind("against", against, Mapping, '{"name": a function without arguments}')
    for name, call in (against or {}).items():
        check_callable(f"against[{name!r}]", call, "() -> anything")
    args, kwargs = as_call(example)
    model = original if original is not None else fast.original
    calls: dict[str, Callable[[], Any]] = {}
    if model is not None:
        calls["original"] = lambda: model(*args, **kwargs)
        if compile_original:
            optimised = torch.compile(model)
            calls["original, torch.compile"] = lambda: optimised(*args, **kwargs)
    else:  # a loaded program has no Python model: its captured graph is the nearest thing
        flat = fast.program.signature.flatten(args, kwargs)
        calls["original"] = lambda: fast.engine.full_graph()(*flat)
    calls[f"eecompile, {fast.executor}"] = lambda: fast(*args, **kwargs)
    calls.update(against or {})
    with torch.no_grad(), mode(fast, False), mode(model if model is not None else fast, False):
        result = fast.run(*args, **kwargs)
        device = result.exit_index.device
        if not len(result.exit_index):
            raise EecompileError("there is nothing to time", got="a batch of 0 rows", wanted="an example with rows")
        wait = (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else None
        measured = rounds_of(calls, rounds, wait=wait)
    base = measured.median("original")
    known = [share for share in measured.others if share is not None]
    rows = []
    for name, seconds in measured.times.items():
        median, spread = summary(seconds)
        rows.append({"name": name, "median_s": median, "spread_s": spread, "ratio": median / base})
    share = {e.name: float((result.exit_index == i).float().mean()) for i, e in enumerate(fast.exits)}
    share["model"] = float((result.exit_index == len(fast.exits)).float().mean())
    return BenchmarkReport(
        batch=int(result.exit_index.numel()),
        threads=torch.get_num_threads(),
        rounds=rounds,
        rows=rows,
        exit_share=share,
        mean_cost=float(result.cost.mean()),
        others=summary(known)[0] if known else None,
    )


__all__ = ["BenchmarkReport", "as_call", "benchmark", "interleaved", "summary"]
