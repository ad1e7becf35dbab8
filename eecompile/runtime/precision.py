"""Autocast around a compiled module: which dtypes its outputs have then, and whether the graph is still the model.

A graph is captured outside of autocast and run under whatever autocast the call is made in: its operators cast their
operands as the model's do. What the model's own code derived from a dtype (`torch.finfo(x.dtype).min`, `x.to(y.dtype)`) is
in the graph as it was when captured. So the first call under each dtype of autocast compares the graph with the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, fx, nn

from eecompile.capture.untouched import trial
from eecompile.errors import CaptureError
from eecompile.program import Program

any_autocast = torch._C._is_any_autocast_enabled
ROWS = 4  # of a call, to compare graph and model on
ROUNDED = 0.02  # relative difference that one rounding of bfloat16 makes, for models that capture reorders by itself


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast on this kind of device casts to now, None outside of autocast."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


class OutputDtypes:
    """Dtypes of the model's output leaves: as captured, or as the graph gives them under autocast."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._captured = tuple(leaf.dtype for leaf in program.signature.outputs)
        self._found: dict[torch.dtype, tuple[torch.dtype, ...]] = {}

    def of(self, flat: Sequence[Tensor]) -> tuple[torch.dtype, ...]:
        """The dtypes for a call with these inputs, in the present state of autocast."""
        if not any_autocast():
            return self._captured
        dtype = autocast_dtype(flat[0].device)
        if dtype is None:
            return self._captured
        if dtype not in self._found:
            with torch.no_grad():
                leaves = _own_leaves(self.program, few_rows(self.program, flat))
            self._found[dtype] = tuple(t.dtype for t in leaves)
        return self._found[dtype]


class AutocastCheck:
    """Compares graph and model at the first call under each dtype of autocast.

    Args:
        program: A captured program.
        model: The user's model; None where there is none any more.
        verified: Names of dtypes that were compared before, as a saved program says.
    """

    def __init__(self, program: Program, model: nn.Module | None, verified: Iterable[str] = ()) -> None:
        self.program, self.model = program, model
        self.verified = {getattr(torch, name) for name in verified}

    def __call__(self, flat: Sequence[Tensor]) -> None:
        """Raises `CaptureError` where the graph is not the model under the present autocast."""
        dtype = autocast_dtype(flat[0].device)
        if dtype is None or dtype in self.verified:
            return
        if self.model is None:
            self._nothing_burned_in(dtype)
        else:
            self._same(self.model, few_rows(self.program, flat), dtype)
        self.verified.add(dtype)

    def _same(self, model: nn.Module, flat: Sequence[Tensor], dtype: torch.dtype) -> None:
        signature = self.program.signature
        args, kwargs = signature.arguments(flat)
        with trial(model):

            def both() -> list[tuple[Tensor, Tensor]]:
                want = signature.flatten_output(model(*args, **kwargs))
                try:
                    got = _own_leaves(self.program, flat)
                except (RuntimeError, TypeError) as error:
                    raise self._refused(dtype, type(model).__name__, str(error).splitlines()[0], "no error") from error
                return list(zip(got, want, strict=True))

            found = both()
            if all(_equal(a, b) for a, b in found):
                return
            with torch.autocast(flat[0].device.type, enabled=False):
                reordered = not all(_equal(a, b) for a, b in both())
        if reordered and all(a.dtype == b.dtype and _near(a, b) for a, b in found):
            return
        where, (got, want) = next((leaf.path, p) for leaf, p in zip(signature.outputs, found, strict=True) if not _equal(*p))
        off = float((got.double() - want.double()).abs().max())
        raise self._refused(
            dtype, f"{type(model).__name__}, output {where}", f"{_name(got.dtype)}, off by {off:.2g}", _name(want.dtype)
        )

    def _refused(self, dtype: torch.dtype, where: str, got: str, wanted: str) -> CaptureError:
        return CaptureError(
            f"under autocast to {_name(dtype)} the captured graph is not the model",
            where=where,
            got=got,
            wanted=wanted,
            hint="the model's code reads dtypes (torch.finfo(x.dtype), x.to(y.dtype)) or the state of autocast, and the "
            f"graph has what they were at capture: compile model.to(torch.{_name(dtype)}) and call it without autocast",
        )

    def _nothing_burned_in(self, dtype: torch.dtype) -> None:
        """Without its model a graph is right under autocast where no floating dtype is written in it."""
        for n in self.program.source.graph.nodes:
            written = [a for a in (*n.args, *n.kwargs.values()) if isinstance(a, torch.dtype) and a.is_floating_point]
            if n.op == "call_function" and written:
                raise CaptureError(
                    f"whether this program is right under autocast to {_name(dtype)} cannot be checked without its model",
                    where=n.name,
                    got=f"{_name(written[0])}, written into the graph when it was captured",
                    hint=f"call the compiled model once under this autocast before it is saved, or compile and save "
                    f"model.to(torch.{_name(dtype)})",
                )


def few_rows(program: Program, flat: Sequence[Tensor], most: int = ROWS) -> list[Tensor]:
    """The first rows of a call's inputs."""
    return [
        t.detach() if leaf.batch_axis is None else t.detach().narrow(leaf.batch_axis, 0, min(most, t.shape[leaf.batch_axis]))
        for t, leaf in zip(flat, program.signature.inputs, strict=True)
    ]


def _own_leaves(program: Program, flat: Sequence[Tensor]) -> list[Tensor]:
    source: fx.GraphModule = program.source
    return list(source(*flat))[: len(program.signature.outputs)]


def _equal(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return bool(((a == b) | (a.isnan() & b.isnan())).all()) if a.is_floating_point() else torch.equal(a, b)


def _near(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a.double(), b.double(), ROUNDED, ROUNDED * float(b.abs().max()), True)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
