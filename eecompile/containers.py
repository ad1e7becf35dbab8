"""Containers of a call (tuples, dicts, output classes) as JSON."""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any

from torch.utils import _pytree as pytree

from eecompile.errors import ArtifactError, MissingDependencyError


def dump_spec(spec: Any) -> str:
    """A container description as JSON.

    Raises:
        ArtifactError: One of the containers has no name to be found by again.
    """
    try:
        return pytree.treespec_dumps(spec)
    except NotImplementedError as error:
        raise ArtifactError(
            "the model gives or takes a container that cannot be saved",
            got=next(iter(str(error).splitlines()), ""),
            wanted="tuples, lists, dicts, or output classes of transformers",
            hint="register its class: torch.export.register_dataclass(cls, serialized_type_name=...)",
        ) from error


def load_spec(text: str) -> Any:
    """A container description from JSON; output classes of transformers are imported, others must be already.

    Raises:
        MissingDependencyError: transformers is needed and not installed.
        ArtifactError: A class that is not imported; nothing is imported on a file's word.
    """

    def names(node: Any) -> set[str]:
        if isinstance(node, dict):
            own = {node["type"]} if isinstance(node.get("type"), str) else set()
            return own.union(*(names(v) for v in node.values()))
        return set().union(*(names(v) for v in node)) if isinstance(node, list) else set()

    for name in sorted(names(json.loads(text))):
        module = name.rpartition(".")[0]
        if name.startswith("transformers."):
            try:
                importlib.import_module(module)
            except ImportError as error:
                raise MissingDependencyError(
                    "this program gives its output in a class of transformers",
                    got=str(error),
                    wanted=name,
                    hint="pip install 'eecompile[hf]'",
                ) from error
        elif "." in name and module not in sys.modules and module not in ("builtins", "collections"):
            raise ArtifactError(
                "this program gives its output in a class that is not imported",
                wanted=name,
                hint=f"import {module} before loading",
            )
    return pytree.treespec_loads(text)
