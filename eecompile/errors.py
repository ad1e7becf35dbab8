"""Every error that eecompile raises on purpose.

A message says four things: what failed, where (module path and node), what was got against what was wanted,
and the next step. The command line prints it in red and exits with 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable


class EecompileError(Exception):
    """Base of all errors of this package.

    Args:
        what: One sentence: what failed.
        where: Module path, node or file that it failed at.
        got: What was there.
        wanted: What was expected instead.
        hint: The next step to take.
    """

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        got: object = None,
        wanted: object = None,
        hint: str | None = None,
    ) -> None:
        self.what, self.where, self.got, self.wanted, self.hint = what, where, got, wanted, hint
        lines = [what]
        if where is not None:
            lines.append(f"  where:  {where}")
        if got is not None:
            lines.append(f"  got:    {got}")
        if wanted is not None:
            lines.append(f"  wanted: {wanted}")
        if hint is not None:
            lines.append(f"  next:   {hint}")
        super().__init__("\n".join(lines))


class UntrainedWarning(UserWarning):
    """Exits, gates, halting or a router were opened before anything was trained there."""


class DriftWarning(UserWarning):
    """A monitor has found that rows are other ones than those of the calibration."""


class CaptureError(EecompileError):
    """The model could not be turned into a graph, or a call does not fit the captured graph."""


class StrategyError(EecompileError):
    """A strategy, head or criterion does not fit this model."""


class MissingMethodError(EecompileError, AttributeError):
    """A method that other compiled modules have and this one does not."""


class NoPlaceError(StrategyError):
    """Nowhere in this model fits what a strategy inserts."""


class PassError(EecompileError):
    """A pass broke a rule of the IR, or was run without what it requires."""


class UnsupportedModelError(EecompileError):
    """Early exit would be wrong for this model, for example because samples influence one another."""


class CalibrationError(EecompileError):
    """Thresholds or calibration data are unusable."""


class ArtifactError(EecompileError):
    """A saved directory is missing, truncated, altered or foreign."""


class ExportError(EecompileError):
    """The program has no form outside of Python for this target, or the file could not be written or run."""


class MissingDependencyError(EecompileError):
    """An optional package is needed for this call."""


def shown(value: object) -> str:
    """`repr` for an error message, also of an int with more digits than Python writes out."""
    try:
        return repr(value)
    except ValueError:
        return f"{type(value).__name__} with too many digits to print"


def near(name: object, valid: Iterable[str]) -> str:
    """The valid names for an error message, nearest to `name` first, whatever that is."""
    names = sorted(set(valid))
    close = difflib.get_close_matches(name if isinstance(name, str) else shown(name), names, n=3, cutoff=0.5)
    listed = ", ".join(names[:20]) + (f", ... ({len(names)} in all)" if len(names) > 20 else "")
    return f"did you mean {', '.join(close)}? valid: {listed}" if close else f"one of: {listed}"


def check_name(what: str, name: object, valid: Collection[str], error: type[EecompileError] = EecompileError) -> None:
    """Checks a name that a user gave; the message has the nearest valid ones.

    Args:
        what: Of what it is the name.
        error: The class to raise.

    Raises:
        EecompileError: It is none of the valid ones.
    """
    if not isinstance(name, str) or name not in valid:
        raise error(f"unknown {what}", got=shown(name), wanted=near(name, valid))
