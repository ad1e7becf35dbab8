"""Translators and runtimes of other projects: what is missing is named, their errors are those of this package."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from importlib import import_module

from eecompile.errors import ExportError, MissingDependencyError

LOGGERS = ("torch.onnx", "onnxscript", "onnx_ir", "torch.onnx._internal.exporter")


@contextlib.contextmanager
def translating(what: str, hint: str = 'target="pt2" needs no translation') -> Iterator[None]:
    """Raises `ExportError`, saying `what`, for whatever a translator raises but for errors of the disk."""
    before = [(log, log.level) for log in map(logging.getLogger, LOGGERS)]
    try:
        for log, _ in before:
            log.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except OSError:
        raise
    except Exception as error:  # they raise many unrelated types
        got = f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"
        raise ExportError(what, got=got, hint=hint) from error
    finally:
        for log, level in before:
            log.setLevel(level)


def require(what: str, extra: str, packages: Sequence[str]) -> None:
    """Raises `MissingDependencyError` unless these packages can be imported.

    Args:
        what: What needs them.
        extra: The extra of this package that brings them.
    """
    for package in packages:
        try:
            import_module(package)
        except ImportError as error:
            raise MissingDependencyError(
                f"{what} needs a package that is not installed",
                got=str(error),
                wanted=package,
                hint=f"pip install 'eecompile[{extra}]'",
            ) from error
