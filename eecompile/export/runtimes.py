"""Runs exported programs in the runtimes that they were exported for."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eecompile.capture.archive import load_archive
from eecompile.errors import EecompileError, ExportError
from eecompile.export.description import KEY, Description
from eecompile.export.files import FOLDER
from eecompile.export.targets import TARGETS
from eecompile.onnx import session
from eecompile.plain import as_path
from eecompile.translating import require

Call = Callable[[Sequence[Tensor]], Sequence[Any]]


@dataclass(frozen=True)
class Opened:
    """An exported program that is loaded.

    Attributes:
        description: What the file says of itself.
        call: Outputs from the model's input tensors, in order.
    """

    description: Description
    call: Call

    def run(self, flat: Sequence[Tensor]) -> list[Tensor]:
        """The output tensors, in order.

        Raises:
            ExportError: The runtime refuses the inputs, or fails.
        """
        with _runtime_errors("the runtime could not run the program"), torch.no_grad():
            return [torch.as_tensor(t) for t in self.call(flat)]


def opened(path: Any) -> Opened:
    """Loads what `export` wrote.

    Raises:
        ExportError: There is no such file, `export` did not write it, or the runtime refuses it.
        MissingDependencyError: The runtime is not installed.
    """
    place = as_path("path", path, ExportError)
    if not place.exists():
        raise ExportError("there is no exported program", where=str(place), hint="write one with fast.export(...)")
    kinds = {".onnx": "onnx", ".xml": "openvino", ".pte": "executorch", "": "stages"}
    target = kinds.get(place.suffix) or ("aoti" if _is_native(place) else "pt2")
    require(f"target {target!r}", TARGETS[target].extra, TARGETS[target].packages)
    with _runtime_errors("the runtime could not load the program", str(place)):
        return OPENERS[target](place)


def _is_native(path: Path) -> bool:
    """Whether a `.pt2` file holds code of AOTInductor."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("data/aotinductor/" in name for name in archive.namelist())


@contextmanager
def _runtime_errors(what: str, where: str | None = None) -> Iterator[None]:
    try:
        yield
    except EecompileError:
        raise
    except Exception as error:  # every runtime has errors of its own
        text = " ".join(str(error).split())
        if re.search(r"IR version: \d|official released onnx opset", text):
            what, text = "the runtime is too old for this file", text[-200:]
        hint = None if where is None else f"{_versions()}; what a newer version wrote may need that version"
        raise ExportError(what, where=where, got=f"{type(error).__name__}: {text[:400]}", hint=hint) from error


def _versions() -> str:
    """The runtimes that are here, with their versions."""
    found = {"torch": str(torch.__version__)}
    for name in ("onnxruntime", "openvino", "executorch"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return "installed: " + ", ".join(f"{name} {v}" for name, v in found.items())


def _by_name(description: Description, call: Callable[..., Sequence[Any]]) -> Opened:
    """A program that takes one input by position, and several by name."""
    names = description.inputs
    if len(names) == 1:
        return Opened(description, lambda flat: call(flat[0]))
    return Opened(description, lambda flat: call(**dict(zip(names, flat, strict=True))))


def _open_pt2(path: Path) -> Opened:
    extra = {f"{KEY}.json": ""}
    program = load_archive(path, extra_files=extra)
    description = Description.from_json(extra[f"{KEY}.json"], str(path))
    return _by_name(description, program.module())


def _open_aoti(path: Path) -> Opened:
    loaded: Any = torch._inductor.aoti_load_package(str(path))
    description = Description.from_json(loaded.get_metadata().get(KEY), str(path))
    return _by_name(description, loaded)


def _open_onnx(path: Path) -> Opened:
    made = session(path)
    description = Description.from_json(made.get_modelmeta().custom_metadata_map.get(KEY), str(path))
    names = description.inputs
    return Opened(description, lambda flat: made.run(None, {n: t.numpy() for n, t in zip(names, flat, strict=True)}))


def _open_openvino(path: Path) -> Opened:
    import openvino

    core = openvino.Core()
    model = core.read_model(str(path))
    text = model.get_rt_info(KEY).value if model.has_rt_info(KEY) else None
    description = Description.from_json(None if text is None else json.dumps(json.loads(text)), str(path))
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = core.compile_model(model, "CPU", options)
    names = description.inputs

    def call(flat: Sequence[Tensor]) -> list[Any]:
        found = compiled({n: t.numpy() for n, t in zip(names, flat, strict=True)})
        return [found[i] for i in range(len(description.outputs))]

    return Opened(description, call)


def _open_stages(path: Path) -> Opened:
    from eecompile.export.driver import Program

    text = (path / FOLDER).read_text() if (path / FOLDER).is_file() else "{}"
    description = Description.from_json(json.dumps(json.loads(text).get(KEY, {})), str(path))
    program, names = Program(path, threads=torch.get_num_threads()), description.inputs

    def call(flat: Sequence[Tensor]) -> list[Any]:
        found = program({n: t.numpy() for n, t in zip(names, flat, strict=True)})
        return [found[n] for n in description.outputs]

    return Opened(description, call)


def _open_executorch(path: Path) -> Opened:
    from executorch.runtime import Runtime

    program = Runtime.get().load_program(path)
    if KEY not in program.method_names:
        return Opened(Description.from_json(None, str(path)), lambda flat: ())
    description = Description.from_json(program.load_method(KEY).execute([])[0], str(path))
    method, (takes, gives) = program.load_method("forward"), description.batch_axes
    rows_of = next(i for i, axis in enumerate(takes) if axis is not None)

    def call(flat: Sequence[Tensor]) -> list[Tensor]:
        """Row by row."""
        found = []
        for k in range(flat[rows_of].shape[takes[rows_of] or 0]):
            row = [t if a is None else t.narrow(a, k, 1).contiguous() for t, a in zip(flat, takes, strict=True)]
            found.append([t.clone() for t in method.execute(row)])  # the next call writes into the same memory
        axes = (*gives, 0, 0)
        return [
            each[0] if a is None else torch.cat(each, a)
            for a, each in zip(axes, map(list, zip(*found, strict=True)), strict=True)
        ]

    return Opened(description, call)


OPENERS: dict[str, Callable[[Path], Opened]] = {
    "pt2": _open_pt2,
    "onnx": _open_onnx,
    "openvino": _open_openvino,
    "aoti": _open_aoti,
    "stages": _open_stages,
    "executorch": _open_executorch,
}
