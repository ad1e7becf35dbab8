"""eecompile: rewrites unmodified PyTorch models so that each input computes only as much as it needs."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from eecompile.errors import (
    ArtifactError,
    CalibrationError,
    CaptureError,
    EecompileError,
    ExportError,
    MissingDependencyError,
    PassError,
    StrategyError,
    UnsupportedModelError,
)

if TYPE_CHECKING:
    from eecompile import criteria, errors, heads, strategies
    from eecompile.advice import advise
    from eecompile.api import eecompile, load
    from eecompile.module import CompiledModule
    from eecompile.public_records import ExitRecord
    from eecompile.result import Result

__version__ = "0.1.0"

__all__ = [
    "ArtifactError",
    "CalibrationError",
    "CaptureError",
    "CompiledModule",
    "EecompileError",
    "ExitRecord",
    "ExportError",
    "MissingDependencyError",
    "PassError",
    "Result",
    "StrategyError",
    "UnsupportedModelError",
    "__version__",
    "advise",
    "criteria",
    "eecompile",
    "errors",
    "heads",
    "load",
    "strategies",
]

# Names that need torch, and where they live: `eecompile --help` and the shell's completion do without it.
_LAZY = {
    "CompiledModule": "eecompile.module",
    "ExitRecord": "eecompile.public_records",
    "Result": "eecompile.result",
    "advise": "eecompile.advice",
    "criteria": "",
    "eecompile": "eecompile.api",
    "heads": "",
    "load": "eecompile.api",
    "strategies": "",
}

if not TYPE_CHECKING:  # type checkers see the imports above, and unknown names stay errors

    def __getattr__(name: str) -> Any:
        """Imports a name at its first use."""
        if name not in _LAZY:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        import_module("eecompile.inspect")  # makes the tree the text of `print(fast)`
        home = _LAZY[name]
        value = getattr(import_module(home), name) if home else import_module(f"{__name__}.{name}")
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted(set(globals()) | set(__all__))
