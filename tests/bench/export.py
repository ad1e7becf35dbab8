"""Programs in ONNX Runtime, OpenVINO and AOTInductor, with and without exits: LeNet at batch 1, BERT-base with its exits
closed, and an exit mix.

The original goes there by the same exporter. The ideal of the mix is the original at the batch sizes that survive, each for
the share of the layers that it runs.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from eecompile import onnx
from eecompile.measuring import summary
from eecompile.strategies import Branchy
from tests.bench import models, saving
from tests.bench.groups import Context
from tests.bench.record import Figure, Target, timed, with_times

LEAVING = (18, 1)
"""Of 20 rows, one at a time: at the first exit and at the second; on MNIST, .92 and .03 of the rows at 0.5 points lost."""
ROWS = 20
Call = Callable[[dict[str, Any]], Any]


def run(context: Context) -> list[Figure]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        figures = row_by_row(context, path)
        return figures if context.small else [*figures, *closed(context, path), *mixed(context, path)]


def row_by_row(context: Context, folder: Path) -> list[Figure]:
    subject = models.lenet(ROWS, Branchy(exits=("relu", "relu_1"), head="conv"))  # those of examples/branchy_lenet.py
    models.spread_out(subject)
    models.force_mix(subject, LEAVING)
    rows = [{"x": row[None]} for row in subject.inputs["x"]]
    runtimes: dict[str, tuple[Call, Call]] = {"ONNX Runtime": in_onnx_runtime(subject, folder)}
    if not context.small:
        runtimes["AOTInductor"] = in_aoti(subject, folder)
    calls: dict[str, Call] = {"original": lambda row: subject.model(**row), "rewritten": lambda row: subject.fast(**row)}
    for name, (own, exits) in runtimes.items():
        calls |= {f"original in {name}": own, f"exits in {name}": exits}
    first = int(subject.fast.run(**subject.inputs).exit_index.argmin())
    timings: dict[str, Callable[[], Any]] = {n: lambda call=call: [call(row) for row in rows] for n, call in calls.items()}
    early = {f"{n}, rows that leave first": lambda c=c: [c(rows[first]) for _ in rows] for n, (_, c) in runtimes.items()}
    rounds = context.measure(timings | early)
    figures = []
    for name in runtimes:
        for against, least in (("original", 3.0), (f"original in {name}", 1.5)):
            rival = "the original in eager mode" if against == "original" else f"the original in {name}"
            what, target = f"LeNet at 1 in {name}, against {rival}", Target(least, "at least")
            figure = timed(what, rounds, f"exits in {name}", against, target, inverse=True)
            share, _ = rounds.ratio(f"{name}, rows that leave first", f"original in {name}")
            cost = float(subject.fast.run(**subject.inputs).cost.min())
            figure.cause = (
                f"A row that leaves first takes {share:.2f} of the original's time there, at {cost:.2f} of its FLOPs."
            )
            figures.append(figure)
    cost = float(subject.fast.run(**subject.inputs).cost.mean())
    for figure in figures:
        figure.detail = {"rows that leave": LEAVING, "of": ROWS, "cost in FLOPs": cost}
    return figures


def closed(context: Context, folder: Path) -> Iterator[Figure]:
    subject = models.bert(8, 128, 3)
    subject.fast.set_thresholds(models.CLOSED)
    for name, (own, exits) in in_runtimes(subject, folder):
        calls = {"original": partial(own, subject.inputs), "rewritten": partial(exits, subject.inputs)}
        rounds = context.measure(calls)
        yield timed(f"{subject.name}, exits closed, in {name}", rounds, "rewritten", "original", Target(1.03))


def mixed(context: Context, folder: Path) -> Iterator[Figure]:
    subject = saving.subject(context)
    for name, (own, exits) in in_runtimes(subject, folder):
        yield realised(f"{subject.name}, realised saving in {name}", subject, context, own, exits)


def realised(name: str, subject: models.Subject, context: Context, own: Call, exits: Call) -> Figure:
    """How much of the ideal saving of an exit mix is saved."""
    sizes = [sum(saving.LEAVING[k:]) for k in range(len(saving.LEAVING))]
    calls: dict[str, Callable[[], Any]] = {"rewritten": partial(exits, subject.inputs)}
    for size in sizes:
        part = {name: t[:size] for name, t in subject.inputs.items()}
        calls[f"original at {size}"] = partial(own, part)
    rounds = context.measure(calls)
    full = rounds.times[f"original at {sizes[0]}"]
    ideal = [
        sum(times) / 4 for times in zip(*(rounds.times[f"original at {s}"] for s in sizes), strict=True)
    ]  # 3 of 12 layers
    saved = [(o - r) / (o - i) for o, r, i in zip(full, rounds.times["rewritten"], ideal, strict=True)]
    value, spread = summary(saved)
    figure = Figure(name, value, "of the ideal saving", spread, target=Target(0.9, "at least"))
    figure.detail = {"exits": saving.EXITS, "leaving": saving.LEAVING, "batch sizes": sizes}
    return with_times(figure, rounds)


def in_runtimes(subject: models.Subject, folder: Path) -> Iterator[tuple[str, tuple[Call, Call]]]:
    """The original and the program with exits in each runtime that is installed."""
    yield "ONNX Runtime", in_onnx_runtime(subject, folder)
    if importlib.util.find_spec("openvino") is not None:
        yield "OpenVINO", in_openvino(subject, folder)
    yield "AOTInductor", in_aoti(subject, folder)


def in_onnx_runtime(subject: models.Subject, folder: Path) -> tuple[Call, Call]:
    """The original, and the program with exits."""
    return original(subject, folder / "own.onnx"), session(subject.fast.export(folder / "exits.onnx", target="onnx"))


def in_openvino(subject: models.Subject, folder: Path) -> tuple[Call, Call]:
    import openvino

    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    original(subject, folder / "own.onnx")
    paths = folder / "own.onnx", subject.fast.export(folder / "exits.xml", target="openvino")
    own, exits = (openvino.Core().compile_model(str(p), "CPU", options) for p in paths)
    return tuple(lambda inputs, of=of: of({n: t.numpy() for n, t in inputs.items()}) for of in (own, exits))


def in_aoti(subject: models.Subject, folder: Path) -> tuple[Call, Call]:
    """The same two as native code, called without Python around the tensors."""
    inputs = tuple(subject.inputs.values())
    with torch.no_grad():
        exported = torch.export.export(subject.model, inputs, dynamic_shapes=[{0: torch.export.Dim.DYNAMIC}], strict=False)
    path = str(folder / "own.pt2")
    packages = (
        torch._inductor.aoti_compile_and_package(exported, package_path=path),
        subject.fast.export(folder / "exits.pt2", target="aoti"),
    )
    own, exits = (torch._inductor.aoti_load_package(str(p)).loader for p in packages)
    return lambda row: own.run(list(row.values())), lambda row: exits.run(list(row.values()))


def original(subject: models.Subject, path: Path) -> Callable[[dict[str, Any]], Any]:
    """The model itself by the same exporter."""
    inputs = dict(subject.inputs)
    free = {name: {0: torch.export.Dim.DYNAMIC} for name in inputs}
    with torch.no_grad():
        exported = torch.export.export(subject.model, (), inputs, dynamic_shapes=free, strict=False)
    shapes = [("batch", *t.shape[1:]) for t in inputs.values()]
    onnx.convert(exported, path, tuple(inputs), ("output",), shapes)
    return session(path)


def session(path: Path) -> Callable[[dict[str, Any]], Any]:
    """Runs a file in ONNX Runtime with as many threads as torch has."""
    made = onnx.session(path)
    return lambda inputs: made.run(None, {name: t.numpy() for name, t in inputs.items()})
