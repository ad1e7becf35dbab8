"""Calls with inputs of other dtypes than captured, such as int32 token ids or a bool mask."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from eecompile.capture.check import LOOSE, difference
from eecompile.capture.untouched import trial
from eecompile.program import Program
from eecompile.runtime.precision import few_rows
from eecompile.signature import OtherDtypes


class DtypeCheck:
    """Converts inputs to the dtypes of capture where no value changes and the model itself gives the same answer.

    Graph and model are compared at the first call with each combination of dtypes.

    Args:
        program: A captured program.
        model: The user's model; None where there is none any more: then nothing is converted.
    """

    def __init__(self, program: Program, model: nn.Module | None) -> None:
        self.program, self.model = program, model
        self.verified: set[tuple[torch.dtype, ...]] = set()

    def __call__(self, error: OtherDtypes) -> list[Tensor]:
        """The inputs of a call in the dtypes of capture; raises `error` where they are not the same to the model."""
        given, signature = error.flat, self.program.signature
        converted = [t.to(leaf.dtype) for t, leaf in zip(given, signature.inputs, strict=True)]
        pairs = zip(given, converted, strict=True)
        if self.model is None or not all(t.dtype == c.dtype or torch.equal(c.to(t.dtype), t) for t, c in pairs):
            raise error
        signature.check(converted)
        dtypes = tuple(t.dtype for t in given)
        if dtypes not in self.verified:
            rows = few_rows(self.program, given)
            self._compare(self.model, rows, few_rows(self.program, converted), error)
            # A mask of ones alone says nothing about one that has zeros: then the next call is compared too.
            other = [t for t, leaf in zip(rows, signature.inputs, strict=True) if t.dtype != leaf.dtype]
            if all(bool((t != t.flatten()[:1]).any()) for t in other):
                self.verified.add(dtypes)
        return converted

    def _compare(self, model: nn.Module, given: list[Tensor], converted: list[Tensor], error: OtherDtypes) -> None:
        signature = self.program.signature
        args, kwargs = signature.arguments(given)
        with trial(model):
            try:
                want = signature.flatten_output(model(*args, **kwargs))
            except Exception as failure:  # the user's code may raise anything
                raise error from failure
            got = list(self.program.source(*converted))
        if any(a.dtype != b.dtype or difference(a, b) > LOOSE for a, b in zip(got, want, strict=False)):
            raise error
