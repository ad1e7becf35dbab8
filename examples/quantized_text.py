"""int8 and early exits together: MiniLM-L6 on IMDB as it is, quantized, with exits, and with both, in ONNX Runtime.

The order is quantize, compile, fit, calibrate, export: the exits are fitted to what the quantized layers give, and the
promise is that of the quantized model. PT2E (``torchao.quantization.pt2e``, static scales) quantizes; its eager mode
computes in floats what an int8 runtime computes in integers, so all times are those of the exported files. ONNX Runtime's
own dynamic quantization of the model without exits is measured too. Needs ``pip install torchao 'eecompile[onnx]'``.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eecompile import eecompile, onnx
from eecompile.errors import MissingDependencyError
from eecompile.strategies import MeBert
from examples._common import (
    PROMISES,
    Inputs,
    Options,
    Record,
    Variant,
    evaluated,
    fitted,
    main,
    minilm_trunk,
    observed,
    rows_of,
    take,
    timed,
)
from examples._parts import imdb_parts

ROWS = {"train": 1_500, "val": 600, "test": 600}
ROWS_QUICK = {"train": 256, "val": 448, "test": 128}
EXITS = 2
PROMISE = {"empirical": PROMISES["empirical"]}
LABEL = "IMDB, MiniLM-L6 in ONNX Runtime"


def torchao() -> tuple[Any, Any, Any]:
    """What PT2E quantization needs: before anything is trained.

    Raises:
        MissingDependencyError: It is not installed.
    """
    try:
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
        from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86
    except ImportError as error:
        hint = "pip install torchao 'eecompile[onnx]'"
        raise MissingDependencyError(
            "quantizing needs a package that is not installed", got=str(error), hint=hint
        ) from error
    return prepare_pt2e, convert_pt2e, x86


def quantized(model: nn.Module, rows: dict[str, Tensor]) -> nn.Module:
    """The model in int8, scales taken from these rows."""
    prepare_pt2e, convert_pt2e, x86 = torchao()
    free = {name: {0: torch.export.Dim.DYNAMIC} for name in rows}
    exported = torch.export.export(model, (), rows, dynamic_shapes=free, strict=False)
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(exported.module(), quantizer)
    with torch.no_grad():
        prepared(**rows)
    made: nn.Module = convert_pt2e(prepared)
    return made


def example(options: Options, record: Record) -> None:
    """From training to timing."""
    torchao()
    base = minilm_trunk(quick=options.quick, seed=options.seed)
    rows = ROWS_QUICK if options.quick else ROWS
    parts = imdb_parts(rows, quick=options.quick, seed=options.seed)
    some = rows_of(parts["train"], 2)
    record.note(data="IMDB", rows_of_data=rows, trunk=base.to_dict())
    record.note(model="MiniLM-L6 (all-minilm-l6-v2) with a pooler and a classifier, exported to ONNX Runtime")
    programs = {}
    for name, model in {"fp32": base.model, "int8": quantized(base.model, some)}.items():
        strategy = MeBert(exits=EXITS, head="mlp")
        fast = programs[name] = eecompile(model, strategy, example_kwargs=take(some, torch.arange(4)))
        record.note(**{f"fit_{name}": fitted(fast, parts["train"], f"quantized-text-{name}", options, base, heads={})})
    record.done("train")
    plain: dict[str, dict[str, Any]] = {}
    for name in (*programs, "int8 by ONNX Runtime"):
        plain[name] = record.row(f"{LABEL}, {name}", thresholds="no exits", original_accuracy=base.accuracy, cost=1.0)
    variants = {}
    for name, fast in programs.items():
        seen = observed(fast, {part: parts[part] for part in ("val", "test")})
        (variants[name],) = evaluated(fast, seen, record, f"{LABEL}, {name} and exits", base.accuracy, PROMISE)
    record.done("evaluate")
    test = rows_of(parts["test"], len(parts["test"]))
    labels = torch.cat([batch["labels"] for batch in parts["test"]])
    with tempfile.TemporaryDirectory() as folder:
        measured(record, programs, variants, plain, (test, labels), Path(folder))


def measured(
    record: Record,
    programs: dict[str, Any],
    variants: dict[str, Variant],
    plain: dict[str, dict[str, Any]],
    test: tuple[Inputs, Tensor],
    folder: Path,
) -> None:
    """Fills rows with what the exported files give: size, accuracy on the test part, and time against that in fp32."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    rows = {}
    for name, fast in programs.items():
        variants[name].before()
        rows[fast.export(folder / f"{name}-exits.onnx", target="onnx")] = variants[name].row
        fast.set_thresholds(2.0)
        rows[fast.export(folder / f"{name}.onnx", target="onnx")] = plain[name]
    quantize_dynamic(folder / "fp32.onnx", folder / "own.onnx", weight_type=QuantType.QInt8)
    rows[folder / "own.onnx"] = plain["int8 by ONNX Runtime"]
    inputs, labels = test
    calls = {path: partial(run, onnx.session(path)) for path in rows}
    for path, row in rows.items():
        parts = [calls[path](**take(inputs, index)) for index in torch.arange(len(labels)).split(50)]
        row["exported_accuracy"] = float((torch.cat(parts).argmax(-1) == labels).double().mean())
        row["megabytes"] = round(path.stat().st_size / 1e6, 1)
        row.setdefault("accuracy", row["exported_accuracy"])
        row.setdefault("full_accuracy", row["exported_accuracy"])
    files = [Variant(row, calls[path]) for path, row in rows.items()]
    timed(record, calls[folder / "fp32.onnx"], inputs, files, (1, 32), {1: 16, 32: 64}, rounds=7)


def run(session: Any, **inputs: Tensor) -> Tensor:
    """The class scores [B, 2] of a file."""
    return torch.from_numpy(session.run(None, {name: t.numpy() for name, t in inputs.items()})[0])


if __name__ == "__main__":
    main("quantized_text", __doc__, example)
