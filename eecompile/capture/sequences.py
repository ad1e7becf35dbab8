"""Packed sequences in a trace: they stay padded, and recurrent layers run each row up to its own end.

    pack_padded_sequence(x, lengths)   gives what holds x [B, S, D] and lengths [B] as they are
    nn.LSTM, nn.GRU, nn.RNN            run `torch.ops.eecompile.packed_rnn`, layer by layer
    pad_packed_sequence(packed)        puts the padding value after each row

The code of these functions is another one for the time of a trace, so code that imported them by name gets it too.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils import rnn
from torch.nn.utils.rnn import PackedSequence

from eecompile.capture import check
from eecompile.errors import UnsupportedModelError
from eecompile.kernels.packed_rnn import packed_rnn_op
from eecompile.signature import Signature

KINDS = (nn.LSTM, nn.GRU, nn.RNN)


def _pack(input: Any, lengths: Any, batch_first: bool = False, enforce_sorted: bool = True) -> Any:
    return _eecompile_pack(input, lengths, batch_first, enforce_sorted)  # type: ignore[name-defined]  # noqa: F821


def _pad(sequence: Any, batch_first: bool = False, padding_value: float = 0.0, total_length: Any = None) -> Any:
    return _eecompile_pad(sequence, batch_first, padding_value, total_length)  # type: ignore[name-defined]  # noqa: F821


@contextlib.contextmanager
def _replaced(pack: Callable[..., Any], pad: Callable[..., Any]) -> Iterator[None]:
    """Other code in torch's two functions."""
    functions = {rnn.pack_padded_sequence: _pack, rnn.pad_packed_sequence: _pad}
    before = {f: f.__code__ for f in functions}
    rnn.__dict__.update(_eecompile_pack=pack, _eecompile_pad=pad)
    try:
        for f, other in functions.items():
            f.__code__ = other.__code__
        yield
    finally:
        for f, code in before.items():
            f.__code__ = code
        for name in ("_eecompile_pack", "_eecompile_pad"):
            del rnn.__dict__[name]


@contextlib.contextmanager
def padded() -> Iterator[list[bool]]:
    """Packed sequences stay padded. Gives a list that is not empty once the longest row of a batch decided a length."""
    trimmed: list[bool] = []

    def pack(x: Tensor, lengths: Any, batch_first: bool, enforce_sorted: bool) -> PackedSequence:
        lengths = torch.as_tensor(lengths).to(torch.int64)
        return PackedSequence(x if batch_first else x.transpose(0, 1), lengths)

    def pad(sequence: Any, batch_first: bool, padding_value: float, total_length: Any) -> tuple[Tensor, Tensor]:
        x, lengths = sequence.data, sequence.batch_sizes
        steps = torch.arange(x.shape[1], device=x.device)
        x = x.masked_fill((steps >= lengths.to(x.device).unsqueeze(1)).unsqueeze(-1), padding_value)
        if total_length is None:
            trimmed.append(True)
        else:
            x = F.pad(x, (0, 0, 0, total_length - x.shape[1]), value=padding_value)
        return x if batch_first else x.transpose(0, 1), lengths

    forwards = {kind: kind.forward for kind in KINDS}

    def forward(self: Any, input: Any, hx: Any = None) -> Any:
        if isinstance(input, PackedSequence):
            return _run(self, input, hx)
        return next(f for kind, f in forwards.items() if isinstance(self, kind))(self, input, hx)

    with _replaced(pack, pad):
        try:
            for kind in KINDS:
                kind.forward = forward  # type: ignore[method-assign]
            yield trimmed
        finally:
            for kind, before in forwards.items():
                kind.forward = before  # type: ignore[method-assign]


def _run(module: nn.RNNBase, sequence: PackedSequence, hx: Any) -> Any:
    x, lengths = sequence.data, sequence.batch_sizes
    per, lstm = 2 if module.bidirectional else 1, module.mode == "LSTM"
    if hx is None:
        sizes = [module.proj_size or module.hidden_size, module.hidden_size][: 1 + lstm]
        states = [x.new_zeros(module.num_layers * per, x.shape[0], n) for n in sizes]
    else:
        states = list(hx) if lstm else [hx]
    ends = []
    for k in range(module.num_layers):
        if k and module.training and module.dropout:
            x = F.dropout(x, module.dropout, True)
        own = slice(k * per, (k + 1) * per)
        weights = [w for direction in module.all_weights[own] for w in direction]
        x, *last = packed_rnn_op(
            x, lengths, [s[own] for s in states], weights, module.mode, module.bias, module.bidirectional, k
        )
        ends.append(last)
    h, c = (torch.cat(e) for e in zip(*ends, strict=True))
    return PackedSequence(x, lengths), (h, c) if lstm else h


def check_trimmed(
    run: Callable[[Sequence[Tensor]], Any], graph: fx.GraphModule, signature: Signature, flat: Sequence[Tensor], where: str
) -> None:
    """Compares graph and model on rows that are all shorter than the example's length.

    Raises:
        UnsupportedModelError: No row of the example is, or the model reads how long the longest row of its batch is.
    """
    plain = types.FunctionType(rnn.pack_padded_sequence.__code__, rnn.__dict__, None, (False, True))
    plain_pad = types.FunctionType(rnn.pad_packed_sequence.__code__, rnn.__dict__, None, (False, 0.0, None))
    full: set[int] = set()

    def pack(x: Tensor, lengths: Any, batch_first: bool, enforce_sorted: bool) -> Any:
        width = x.shape[1 if batch_first else 0]
        full.update(i for i, n in enumerate(torch.as_tensor(lengths).tolist()) if n >= width)
        return plain(x, lengths, batch_first, enforce_sorted)

    with torch.no_grad():
        with _replaced(pack, plain_pad):
            run(flat)
        short = [i for i in range(signature.batch_size(flat)) if i not in full]
        hint = "pass total_length=x.size(1) to pad_packed_sequence"
        if not short:
            raise UnsupportedModelError(
                "whether answers depend on the longest row of a batch cannot be found from this example",
                where=where,
                got="pad_packed_sequence without total_length, and no row with padding",
                wanted="an example in which some rows are shorter than the length of its tensors",
                hint=f"give such an example, or {hint}",
            )
        rows = check.rows(signature, flat, short)
        want = signature.flatten_output(run(rows))
        if check.compare(graph, rows, want, "rows with padding"):
            raise UnsupportedModelError(
                "an answer depends on the longest row of its batch, so rows may not leave a batch early",
                where=where,
                got="pad_packed_sequence without total_length, and a forward that reads the padding after a row",
                wanted="answers that depend on the row alone",
                hint=hint,
            )
