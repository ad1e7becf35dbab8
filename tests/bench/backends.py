"""Whether another back end for the segments of `compact` would pay: the fastest in eager mode, the original or the program
with its exits closed, against the same program in ONNX Runtime and, where they are installed, in OpenVINO and ExecuTorch.

In int8 the rivals are torch's dynamic quantization of the linear layers and that of ONNX Runtime. `backend="onnxruntime"`
then runs ResNet-20 with half of its rows leaving early, against the same exits in eager mode and against the model without
exits in ONNX Runtime.
"""

from __future__ import annotations

import copy
import importlib.util
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from eecompile import onnx
from eecompile.export import TARGETS
from eecompile.export.runtimes import opened
from eecompile.strategies import MeBert
from tests.bench import models
from tests.bench.export import original
from tests.bench.groups import Context
from tests.bench.record import Figure, timed

WORTH = 1.15
ROWS = 16
EXITS, OWN = 'backend="onnxruntime"', "the original in ONNX Runtime"
RUNTIMES = {"ONNX Runtime": "onnx", "OpenVINO": "openvino", "ExecuTorch": "executorch"}


def run(context: Context) -> list[Figure]:
    small = [lambda: models.lenet(1, 2), lambda: models.lenet(64, 2)]
    large = [lambda: models.resnet(1, 2), lambda: models.resnet(64, 2), lambda: minilm(32, 16)]
    figures = []
    for make in small if context.small else [*small, *large]:
        subject = make()
        with tempfile.TemporaryDirectory() as folder:
            figures.append(figure(subject.name, context, eager(subject), in_runtimes(subject, Path(folder))))
    for batch in (1, 32, 64):
        figures += [] if context.small and batch > 1 else segments(batch, context)
    with tempfile.TemporaryDirectory() as folder:
        subject = minilm(4, 4) if context.small else minilm(32, 16)
        figures.append(figure(f"{subject.name}, int8", context, *in_int8(subject, Path(folder))))
    return figures


def minilm(batch: int, length: int) -> models.Subject:
    """Six layers, 384 wide, two classes."""
    torch.manual_seed(0)
    size = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    config = hf.BertConfig(num_labels=2, **size)
    made = torch.Generator().manual_seed(2)
    inputs = {"input_ids": torch.randint(1000, config.vocab_size, (batch, length), generator=made)}
    return models.Subject(f"MiniLM {batch} x {length}", hf.BertForSequenceClassification(config), inputs, MeBert(exits=2))


def segments(batch: int, context: Context) -> list[Figure]:
    """ResNet-20 with a quarter of the rows leaving at each of two exits; rows one by one at batch 1."""
    rows = max(batch, ROWS)
    subject = models.resnet(rows, 2)
    models.force_mix(subject, (rows // 4, rows // 4))
    cost = float(subject.fast.run(**subject.inputs).cost.mean())
    parts = [{k: t[i : i + batch] for k, t in subject.inputs.items()} for i in range(0, rows, batch)]

    def by(backend: str) -> Callable[[], Any]:
        def call() -> Any:
            subject.fast.backend = backend
            return [subject.fast(**part) for part in parts]

        return call

    with tempfile.TemporaryDirectory() as folder:
        own = original(subject, Path(folder) / "own.onnx")
        calls = {"exits in eager mode": by("eager"), EXITS: by("onnxruntime"), OWN: lambda: [own(part) for part in parts]}
        rounds = context.measure({**calls, "original": lambda: [subject.model(**part) for part in parts]})
    made = []
    for rival in ("exits in eager mode", OWN, "original"):
        f = timed(f"ResNet-20 at {batch}, {EXITS}, against {rival}", rounds, EXITS, rival, inverse=True)
        f.detail = {"rows": rows, "leaving": [rows // 4] * 2, "cost": cost}
        made.append(f)
    return made


Calls = Mapping[str, Callable[[], Any]]


def figure(name: str, context: Context, ours: Calls, theirs: Calls) -> Figure:
    """How many times as fast as the fastest of ours the fastest of theirs is."""
    rounds = context.measure({**ours, **theirs})
    first, best = (min(calls, key=rounds.median) for calls in (ours, theirs))
    made = timed(name, rounds, best, first, inverse=True)
    made.detail = {"fastest runtime": best, "fastest in eager mode": first, "worth a back end": made.value >= WORTH}
    return made


def eager(subject: models.Subject) -> Calls:
    subject.fast.set_thresholds(models.CLOSED)
    return {"original": subject.original, "rewritten, exits closed": subject.compiled}


def in_runtimes(subject: models.Subject, folder: Path) -> Calls:
    found = {}
    flat = list(subject.inputs.values())
    for name, target in RUNTIMES.items():
        missing = importlib.util.find_spec({"onnx": "onnxruntime"}.get(target, target)) is None
        if missing or (target == "executorch" and subject.size > 1):  # a row a call
            continue
        program = opened(subject.fast.export(folder / f"net{TARGETS[target].suffix}", target=target))
        found[name] = lambda program=program: program.run(flat)
    return found


def in_int8(subject: models.Subject, folder: Path) -> tuple[Calls, Calls]:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize: Any = torch.ao.quantization.quantize_dynamic
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces the end of its quantized tensors
        ours = quantize(copy.deepcopy(subject.model).eval(), {nn.Linear}, dtype=torch.qint8)
    subject.fast.set_thresholds(models.CLOSED)
    quantize_dynamic(
        subject.fast.export(folder / "net.onnx", target="onnx"), folder / "int8.onnx", weight_type=QuantType.QInt8
    )
    session = onnx.session(folder / "int8.onnx")
    given: dict[str, Tensor] = dict(subject.inputs)
    return (
        {"torch dynamic int8": lambda: ours(**given)},
        {"ONNX Runtime dynamic int8": lambda: session.run(None, {k: t.numpy() for k, t in given.items()})},
    )
