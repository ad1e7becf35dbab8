"""Which inserted modules are untrained: their weights are those that they were inserted with.

A module that eecompile made is marked with a digest of its weights. Whatever changes them counts as training: `fit`, a loop
of the user's own, `load_state_dict`. Modules without a mark, such as a model's own final layers, come trained.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

MARK = "_eecompile_untrained"


def bytes_of(tensor: Tensor) -> bytes:
    """What a tensor holds, as digests read it."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def digest(module: nn.Module) -> str:
    """Of the bytes of all parameters."""
    found = hashlib.blake2b(digest_size=16)
    for p in module.parameters():
        found.update(bytes_of(p))
    return found.hexdigest()


def mark_untrained(module: nn.Module) -> None:
    """Says that a module's present weights are no trained ones; nothing to say of one without parameters."""
    if next(module.parameters(), None) is not None:
        module.__dict__[MARK] = digest(module)


def untrained(module: nn.Module, device: torch.device, dtype: str) -> nn.Module:
    """A new module, moved to where it is inserted and marked."""
    module.to(device=device, dtype=getattr(torch, dtype))
    mark_untrained(module)
    return module


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random weights are those of this seed; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def is_untrained(module: nn.Module) -> bool:
    """Whether its weights are those that it was marked with; asked once more only until they are not."""
    marked = module.__dict__.get(MARK)
    if marked is None:
        return False
    if marked == digest(module):
        return True
    del module.__dict__[MARK]
    return False
