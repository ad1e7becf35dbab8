"""Models of local Hugging Face directories, loaded by transformers without a word on the streams."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from eecompile.errors import EecompileError, MissingDependencyError


def library(directory: Path) -> Any:
    """transformers, quiet.

    Raises:
        MissingDependencyError: It is not installed.
    """
    try:
        import transformers
        from transformers.utils import logging
    except ImportError as error:
        raise MissingDependencyError(
            "this looks like a directory of transformers",
            where=str(directory),
            got=str(error),
            hint="pip install 'eecompile[hf]'",
        ) from error
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return transformers


def model_of(directory: Path) -> tuple[nn.Module, Any]:
    """The model and its config.

    Raises:
        MissingDependencyError: transformers is not installed.
        EecompileError: The directory does not hold a model that transformers can load.
    """
    transformers = library(directory)
    try:
        config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
        architectures = getattr(config, "architectures", None) or []
        kind = getattr(transformers, architectures[0], None) if architectures else None
        if kind is None:
            raise EecompileError(
                "transformers knows no class for this model",
                where=str(directory / "config.json"),
                got=f"architectures: {architectures}",
                hint="load it in a file of your own and give file.py:attr",
            )
        return kind.from_pretrained(directory, local_files_only=True).eval(), config
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise EecompileError("transformers cannot load this", where=str(directory), got=first) from error
