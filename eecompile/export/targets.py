"""The targets of `export`, and what each writes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eecompile.errors import ExportError, check_name
from eecompile.export.description import KEY, Description
from eecompile.export.files import placing
from eecompile.export.to_pt2 import write as _pt2
from eecompile.ir.settings import Settings
from eecompile.onnx import PACKAGES
from eecompile.plain import as_path
from eecompile.program import Program
from eecompile.translating import require, translating


@dataclass(frozen=True)
class Target:
    """A runtime, or a form of files that runtimes take.

    Attributes:
        suffix: Of the file.
        extra: The extra of this package that it needs, empty for none.
        packages: The modules that this extra brings.
        write: `write(program, settings, description, path)`.
        compiled: Whether a compiler makes other code of the program, which may be wrong.
    """

    suffix: str
    extra: str
    packages: tuple[str, ...]
    write: Callable[[Program, Settings, Description, Path], None]
    compiled: bool = False


def export(
    program: Program, settings: Settings, path: Any, target: Any, check: Callable[[Path], None] | None = None
) -> Path:
    """Writes the program for a runtime, with its exits, and gives the path.

    Args:
        path: A file whose name ends as the target asks for.
        target: One of `TARGETS`.
        check: Raises where what a compiler made is wrong, before anything stands at the path.

    Raises:
        ExportError: An unknown target, a name that does not fit, a place that cannot be written to, or a program that has no
            such form; the message says what and why.
        MissingDependencyError: The target needs packages that are not installed.
    """
    check_name("target", target, TARGETS, ExportError)
    found, place = TARGETS[target], as_path("path", path, ExportError)
    if place.suffix != found.suffix:
        raise ExportError(
            "the name does not fit the target",
            where=str(place),
            got=place.suffix or "no suffix",
            wanted=f"{found.suffix} for target {target!r}",
        )
    require(f"target {target!r}", found.extra, found.packages)
    with placing(place, folder=not found.suffix) as scratch:
        found.write(program, settings, Description.of(program, settings, target), scratch)
        if found.compiled and check is not None:
            check(scratch)
    return place


def _onnx(program: Program, settings: Settings, description: Description, path: Path) -> None:
    from eecompile.export.to_onnx import write

    write(program, settings, description, path)


def _openvino(program: Program, settings: Settings, description: Description, path: Path) -> None:
    import openvino

    source = path.with_suffix(".onnx")
    _onnx(program, settings, description, source)
    with translating("OpenVINO could not convert the program", 'target="onnx" needs no conversion'):
        model = openvino.convert_model(str(source))
    for each in source.parent.glob(f"{source.name}*"):
        each.unlink()
    model.set_rt_info(description.to_json(), KEY)
    openvino.save_model(model, str(path), compress_to_fp16=False)


def _aoti(program: Program, settings: Settings, description: Description, path: Path) -> None:
    from eecompile.export.to_aoti import write

    write(program, settings, description, path)


def _stages(program: Program, settings: Settings, description: Description, path: Path) -> None:
    from eecompile.export.stages import write

    write(program, settings, description, path)


def _executorch(program: Program, settings: Settings, description: Description, path: Path) -> None:
    from eecompile.export.to_executorch import write

    write(program, settings, description, path)


TARGETS = {
    "pt2": Target(".pt2", "", (), _pt2),
    "onnx": Target(".onnx", "onnx", PACKAGES, _onnx),
    "aoti": Target(".pt2", "", (), _aoti, compiled=True),
    "stages": Target("", "onnx", PACKAGES, _stages),
    "openvino": Target(".xml", "openvino", (*PACKAGES, "openvino"), _openvino),
    "executorch": Target(".pte", "executorch", ("executorch.exir", "executorch.runtime"), _executorch),
}
