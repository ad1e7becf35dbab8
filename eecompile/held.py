"""Numbers that cross between the host and a module's device, each once: telling what rows cost waits for nothing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Held:
    """What a compiled module holds on the other side."""

    def __init__(self) -> None:
        self._numbers: dict[str, tuple[Tensor, int, list[float]]] = {}
        self._constants: dict[tuple[tuple[float, ...], torch.dtype, torch.device], Tensor] = {}

    def numbers(self, name: str, buffer: Tensor) -> list[float]:
        """Values of a buffer, on the host; read again only where another one was put there or it was written to."""
        if buffer.is_inference():  # nobody counts what is written to it
            return [float(v) for v in buffer.flatten().tolist()]
        version = buffer._version
        found = self._numbers.get(name)
        if found is None or found[0] is not buffer or found[1] != version:
            found = self._numbers[name] = buffer, version, [float(v) for v in buffer.flatten().tolist()]
        return list(found[2])

    def constant(self, values: Sequence[float], device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
        """Values on a device. Not to be written to."""
        key = tuple(values), dtype, device
        found = self._constants.get(key)
        if found is None:
            with torch.inference_mode(False):
                found = self._constants[key] = torch.tensor(values, dtype=dtype, device=device)
        return found
