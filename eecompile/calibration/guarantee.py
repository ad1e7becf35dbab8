"""The guarantee that a compiled module carries, what it was made for, and why it holds no more.

It holds for the weights, the dtype, the backend, the kind of executor and the settings that were calibrated. Anything else
may answer otherwise, and makes it void.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from eecompile.untrained import bytes_of

if TYPE_CHECKING:
    from eecompile.module import CompiledModule

Values = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Guarantee:
    """A promise of `calibrate`.

    Attributes:
        text: In words.
        max_drop: Largest drop, with probability `1 - delta`.
        target: "accuracy", "agreement" or "metric".
        made_for: `fingerprint` of the module.
        settings: As they were set.
        safer: Settings that satisfy the same bound and leave less early, the next one first.
        rows: Of the calibration.
        disagreement: Share of them whose early class is another than the full model's; None where there are no classes.
        shares: Of the calibration rows that leave at each exit and, last, at the model's own end; empty without exits.
    """

    text: str
    max_drop: float
    delta: float
    target: str
    made_for: Mapping[str, str]
    settings: Values
    safer: tuple[Values, ...] = ()
    shares: tuple[float, ...] = ()
    rows: int = 0
    disagreement: float | None = None

    def void(self, fast: CompiledModule) -> str:
        """Why it does not hold for the module as it is now; empty where it does."""
        now = fingerprint(fast)
        changed = [f"{what}: {now[what]} now, {was} then" for what, was in self.made_for.items() if now[what] != was]
        changed = ["the weights have changed" if c.startswith("weights") else c for c in changed]
        nothing_early = fast.settings.neutral().to_dict()  # loses nothing
        if fast.settings.to_dict() not in (self.settings, *self.safer, nothing_early):
            changed.append("other settings than were calibrated")
        return "; ".join(changed)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Guarantee:
        return cls(**{**data, "safer": tuple(data["safer"]), "shares": tuple(data["shares"])})


def guarantee_of(fast: CompiledModule, report: Any) -> Guarantee | None:
    """The promise of a calibration report whose settings are set; None where it makes none."""
    parts = [report, *getattr(report, "before", ())]
    if getattr(report, "delta", None) is None or not any(part.qualified for part in parts):
        return None
    return Guarantee(
        text=" ".join(part.guarantee for part in parts if part.qualified),
        max_drop=sum(part.max_drop for part in parts if part.qualified),
        delta=sum(part.delta for part in parts),
        target=report.target,
        made_for=fingerprint(fast),
        settings=fast.settings.to_dict(),
        safer=tuple(s.to_dict() for s in report.safer),
        shares=tuple(e.share for e in report.exits),
        rows=report.rows,
        disagreement=report.disagreement,
    )


def fingerprint(fast: CompiledModule) -> dict[str, str]:
    """What answers depend on: weights, dtype, backend and the kind of executor (those of the host agree)."""
    parameters = list(fast.graph_module.parameters())
    return {
        "dtype": ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in parameters})),
        "backend": fast.backend,
        "executor": "device" if fast.executor == "device" else "host",
        "weights": _digest(fast, parameters),
    }


def _digest(fast: CompiledModule, parameters: list[nn.Parameter]) -> str:
    """Of the bytes of all parameters, whatever their order; computed again only where one was written to."""
    state = [(p.data_ptr(), p._version, p.dtype) for p in parameters]
    if fast.digest is None or fast.digest[0] != state:
        fast.digest = state, _digest_of(parameters)
    return fast.digest[1]


def _plain(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensors that a quantized one is made of; a plain one by itself."""
    made_of: Any = tensor
    if not is_traceable_wrapper_subclass(made_of):
        return [tensor]
    names, _ = made_of.__tensor_flatten__()
    return [t for name in names for t in _plain(getattr(made_of, name))]


def _digest_of(parameters: list[nn.Parameter]) -> str:
    each = sorted(hashlib.blake2b(bytes_of(t), digest_size=16).digest() for p in parameters for t in _plain(p))
    return hashlib.blake2b(b"".join(each), digest_size=16).hexdigest()


def said(fast: CompiledModule) -> str | None:
    """The guarantee of a module in words, or that it is void and why; None where there is none."""
    found: Guarantee | None = fast.guarantee
    if found is None:
        return None
    void = found.void(fast)
    return f"The guarantee is void: {void}. Calibrate again." if void else found.text
