"""One layer of a recurrent network over padded sequences, each row up to its own end: what PyTorch computes on packed ones.

Packing has sizes that depend on the data, which no graph can hold. Here values stay padded, `[B, S, D]`, and are packed for
as long as the layer runs, so rows do not influence one another and every number is PyTorch's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils.flop_counter import register_flop_formula

from eecompile.kernels._autograd import differentiable

LAYERS = {"LSTM": torch.lstm, "GRU": torch.gru, "RNN_TANH": torch.rnn_tanh, "RNN_RELU": torch.rnn_relu}

# --- definition -----------------------------------------------------------------------------------


def packed_rnn(
    x: Tensor, lengths: Tensor, states: list[Tensor], weights: list[Tensor], mode: str, biases: bool, both: bool, layer: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition, by PyTorch's own operators.

    Args:
        x: `[B, S, D]`, padded at the end.
        lengths: `[B]` integers, 1 to S.
        states: The hidden state before the first step `[1 or 2, B, H]`, and the cell state of an LSTM.
        weights: Of both directions, as `nn.RNNBase` has them.
        mode: "LSTM", "GRU", "RNN_TANH" or "RNN_RELU".
        biases: Whether there are biases among the weights.
        both: Whether it runs in both directions.
        layer: Number of the layer in its stack: a name, without effect.

    Returns:
        Outputs `[B, S, H or 2 H]`, 0 in padding; hidden and cell state after each row's own last step `[1 or 2, B, H]`, the
        latter empty where there is none.
    """
    if x.shape[0] == 0:
        return _like(x, states, both)
    packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
    order, back = packed.sorted_indices, packed.unsorted_indices
    assert order is not None and back is not None
    given = [s.index_select(1, order) for s in states]
    train = torch.is_grad_enabled()  # cuDNN needs to know that a backward follows
    options = (weights, biases, 1, 0.0, train, both)
    call: Any = LAYERS[mode]
    data, *last = call(packed.data, packed.batch_sizes, given if mode == "LSTM" else given[0], *options)
    out, _ = pad_packed_sequence(PackedSequence(data, packed.batch_sizes, order, back), True, 0.0, x.shape[1])
    ends = [s.index_select(1, back) for s in last]
    return out, ends[0], ends[1] if len(ends) > 1 else x.new_empty(0)


def _like(x: Tensor, states: list[Tensor], both: bool) -> tuple[Tensor, Tensor, Tensor]:
    out = x.new_zeros((x.shape[0], x.shape[1], states[0].shape[2] * (2 if both else 1)))
    ends = [s.new_zeros((s.shape[0], x.shape[0], s.shape[2])) for s in states]
    return out, ends[0], ends[1] if len(ends) > 1 else x.new_empty(0)


# --- operator -------------------------------------------------------------------------------------


@torch.library.custom_op("eecompile::packed_rnn", mutates_args=())
def packed_rnn_op(
    x: Tensor, lengths: Tensor, states: list[Tensor], weights: list[Tensor], mode: str, biases: bool, both: bool, layer: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`packed_rnn` as `torch.ops.eecompile.packed_rnn`."""
    return packed_rnn(x, lengths, states, weights, mode, biases, both, layer)


@packed_rnn_op.register_fake
def _fake(
    x: Tensor, lengths: Tensor, states: list[Tensor], weights: list[Tensor], mode: str, biases: bool, both: bool, layer: int
) -> tuple[Tensor, Tensor, Tensor]:
    return _like(x, states, both)


differentiable(packed_rnn_op, packed_rnn)


@register_flop_formula(torch.ops.eecompile.packed_rnn)
def _flops(x: Any, lengths: Any, states: Any, weights: Any, *args: Any, **kwargs: Any) -> int:
    """Of padded sequences: two for each weight, step and row."""
    matrices = sum(w[0] * w[1] for w in weights if len(w) == 2)
    return int(2 * x[0] * x[1] * matrices)
