"""Training state without pickle: nested values as JSON plus tensors, and the random generators.

`encode` turns what `optimizer.state_dict()` and the like give into a JSON tree, with tensors set aside by
name; `decode` is its inverse. Floats survive exactly: JSON writes the shortest text that reads back as the
same double.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eecompile.errors import EecompileError


def encode(value: Any, tensors: dict[str, Tensor], path: str) -> Any:
    """`value` as JSON; tensors go into `tensors` under names that start with `path`.

    Raises:
        EecompileError: A type that would need pickle; the message says where it is.
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, Tensor):
        tensors[path] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": path}
    if isinstance(value, Mapping):
        return {"dict": [[key_of(k, path), encode(v, tensors, f"{path}.{k}")] for k, v in value.items()]}
    if isinstance(value, (list, tuple)):
        items = [encode(item, tensors, f"{path}.{index}") for index, item in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "list": items}
    raise EecompileError(
        "this training state cannot be written without pickle",
        where=path,
        got=type(value).__name__,
        wanted="tensors, numbers, strings, None and containers of them",
        hint="use an optimizer and a scheduler with a plain state_dict(), or fit without checkpoint_dir",
    )


def key_of(key: Any, path: str) -> Any:
    if not isinstance(key, (str, int)):
        raise EecompileError("a key of the training state is neither text nor integer", where=path, got=repr(key))
    return key


def decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Inverse of `encode`."""
    if not isinstance(value, dict):
        return value
    (kind, content), *_ = value.items()
    if kind == "float":
        return float(content)
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: decode(item, tensors) for key, item in content}
    items = [decode(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items


def random_state(device: torch.device) -> dict[str, Any]:
    """State of the generators of torch (CPU and `device`), Python and NumPy."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)  # noqa: NPY002
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": [str(kind), torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, gauss],
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Inverse of `random_state`."""
    torch.set_rng_state(state["torch"].cpu())
    random.setstate(state["python"])
    kind, keys, position, has_gauss, gauss = state["numpy"]
    words = keys.numpy().astype(np.uint32)
    np.random.set_state((kind, words, position, has_gauss, gauss))  # noqa: NPY002
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)


def reseed(seed: int, epoch: int, rank: int, loader: Any) -> None:
    """Seeds every generator for one epoch, that of the loader and its samplers included.

    The order of the data then depends on `seed` and `epoch` alone, and not on what ran before.
    """
    # SplitMix64's odd constant spreads neighbouring pairs over all 64 bits
    mixed = ((seed * 1_000_003 + epoch) * 0x9E3779B97F4A7C15 + rank) % 2**63
    torch.manual_seed(mixed)
    random.seed(mixed)
    np.random.seed(mixed % 2**32)  # noqa: NPY002
    shared = ((seed * 1_000_003 + epoch) * 0x9E3779B97F4A7C15) % 2**63
    for holder in holders(loader):
        generator = getattr(holder, "generator", None)
        if isinstance(generator, torch.Generator):
            generator.manual_seed(shared)
        if callable(getattr(holder, "set_epoch", None)):
            holder.set_epoch(epoch)


def holders(loader: Any) -> list[Any]:
    """The loader and the samplers inside it, each of which may have a generator of its own."""
    found: list[Any] = []
    todo = [loader]
    while todo:
        holder = todo.pop(0)
        if holder is None or any(holder is other for other in found):
            continue
        found.append(holder)
        todo += [getattr(holder, name, None) for name in ("sampler", "batch_sampler")]
    return found
