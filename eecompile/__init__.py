"""eecompile: rewrites unmodified PyTorch models so that each input computes only as much as it needs."""

from eecompile import criteria, errors, heads, strategies
from eecompile.api import eecompile, load
from eecompile.errors import (
    ArtifactError,
    CalibrationError,
    CaptureError,
    EecompileError,
    MissingDependencyError,
    PassError,
    StrategyError,
    UnsupportedModelError,
)
from eecompile.module import CompiledModule, ExitRecord
from eecompile.program import Result

__version__ = "0.1.0"

__all__ = [
    "ArtifactError",
    "CalibrationError",
    "CaptureError",
    "CompiledModule",
    "EecompileError",
    "ExitRecord",
    "MissingDependencyError",
    "PassError",
    "Result",
    "StrategyError",
    "UnsupportedModelError",
    "__version__",
    "criteria",
    "eecompile",
    "errors",
    "heads",
    "load",
    "strategies",
]
