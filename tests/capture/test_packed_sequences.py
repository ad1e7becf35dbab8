"""Packed sequences: recurrent layers run each row up to its own end, as PyTorch does, in every executor."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import rnn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from eecompile import UnsupportedModelError, load, strategies
from eecompile.capture import sequences
from tests.support import CLOSED, both, close, equal_bits, same_result
from tests.support import compiled as eecompile

WIDTH = 8


class Packed(nn.Module):
    """Tokens [B, S] and lengths [B] to [B, 3]; `read` says what the classifier gets."""

    def __init__(self, kind: type[nn.RNNBase], read: str, total: bool = True, **options: object) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.emb = nn.Embedding(50, WIDTH)
        self.rnn = kind(WIDTH, WIDTH, **{"num_layers": 3, "batch_first": True, **options})  # type: ignore[arg-type]
        self.read, self.total = read, total
        self.out = nn.Linear(WIDTH * (2 if self.rnn.bidirectional else 1), 3)

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        x = self.emb(ids)
        first = self.rnn.batch_first
        packed = pack_padded_sequence(x if first else x.transpose(0, 1), lengths.cpu(), first, enforce_sorted=False)
        if self.read == "data":  # work on the packed values themselves
            packed = PackedSequence(packed.data.tanh(), *packed[1:])
        given = None
        if self.read == "given":
            given = x.mean(1).expand(self.rnn.num_layers, -1, -1).contiguous()
        out, states = self.rnn(packed, given)
        h = states[0] if isinstance(states, tuple) else states
        if self.read == "cell":
            return self.out(states[1][-1])
        if self.read in ("state", "data", "given"):
            return self.out(torch.cat((h[-2], h[-1]), 1) if self.rnn.bidirectional else h[-1])
        values, found = pad_packed_sequence(out, first, total_length=ids.shape[1] if self.total else None)
        values = values if first else values.transpose(0, 1)
        if self.read == "sum":
            return self.out(values.sum(1) / found.unsqueeze(1))
        if self.read == "mean":  # reads how long the longest row is
            return self.out(values.mean(1))
        last = (found - 1).view(-1, 1, 1).expand(-1, 1, values.shape[2])
        return self.out(values.gather(1, last).squeeze(1))


def batch(rows: int, steps: int = 7, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 50, (rows, steps), generator=g), torch.randint(1, steps + 1, (rows,), generator=g)


KINDS = {
    "lstm state": partial(Packed, nn.LSTM, "state"),
    "lstm cell": partial(Packed, nn.LSTM, "cell"),
    "both directions": partial(Packed, nn.LSTM, "state", bidirectional=True),
    "gru last, time first": partial(Packed, nn.GRU, "last", batch_first=False),
    "gru given state": partial(Packed, nn.GRU, "given"),
    "rnn on packed values": partial(Packed, nn.RNN, "data", num_layers=2),
    "sum without total length": partial(Packed, nn.LSTM, "sum", total=False),
}


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_length_is_answered_as_the_model_answers(kind):
    model = KINDS[kind]().eval()
    codes = rnn.pack_padded_sequence.__code__, rnn.pad_packed_sequence.__code__, nn.LSTM.forward
    fast = eecompile(model, strategies.Branchy(exits=1, head="linear"), example_inputs=batch(6))
    assert codes == (rnn.pack_padded_sequence.__code__, rnn.pad_packed_sequence.__code__, nn.LSTM.forward)
    fast.set_thresholds(CLOSED)
    for rows, steps in ((5, 7), (1, 7), (4, 3), (3, 12)):
        given = batch(rows, steps, seed=rows)
        close(fast(*given), model(*given))
    given = batch(8)
    confidence = fast.observe(*given).confidences[0].sort().values
    fast.set_thresholds(float(confidence[3] + confidence[4]) / 2)
    compact, reference = both(fast, *given)
    same_result(compact, reference)
    assert 0 < compact.exit_index.sum() < 8


def test_exits_and_gates_fit_between_the_layers(tmp_path):
    model = Packed(nn.LSTM, "state", num_layers=4).eval()
    strategy = strategies.Branchy(exits="every-block", head="linear") + strategies.SkipNet(unit="linear")
    fast = eecompile(model, strategy, example_inputs=batch(6))
    assert [b.name for b in fast.program.structure.blocks] == [f"rnn.{k}" for k in range(4)]
    assert len(fast.exits) == 3
    assert fast.exits[0].depth == pytest.approx(0.25, abs=0.02)
    fast.set_thresholds(CLOSED)
    given = batch(8)
    scores = fast.observe(*given).trace.gate_scores.sort(0).values
    fast.set_gate_thresholds(((scores[3] + scores[4]) / 2).tolist())
    compact, reference = both(fast, *given)
    same_result(compact, reference)
    assert len(set(compact.gates.sum(1).tolist())) > 1
    fast.save(tmp_path / "program")
    equal_bits(load(tmp_path / "program")(*given), fast(*given))


def test_the_trunk_is_trained_through_packed_layers():
    model = Packed(nn.LSTM, "state", num_layers=2, dropout=0.5).eval()
    fast = eecompile(model, strategies.Branchy(exits=1, trunk=True, head="linear"), example_inputs=batch(6))
    (ids, lengths), names = batch(6), [n for n, _ in model.named_parameters() if "rnn" in n]
    with torch.enable_grad():
        found = torch.autograd.grad(
            fast.program.source(ids, lengths)[0].square().sum(), [fast.program.source.get_parameter(n) for n in names]
        )
        wanted = torch.autograd.grad(model(ids, lengths).square().sum(), [model.get_parameter(n) for n in names])
    for a, b in zip(found, wanted, strict=True):
        close(a, b)
    before = model.rnn.weight_hh_l1.detach().clone()
    fast.fit([((ids, lengths), torch.arange(6) % 3)], epochs=1, progress=False)
    assert not torch.equal(fast.graph_module.get_parameter("rnn.weight_hh_l1"), before)


@pytest.mark.parametrize(
    ("read", "lengths", "says"),
    [
        ("mean", [7, 3, 4, 2], "depends on the longest row of its batch"),
        ("sum", [7, 7, 7, 7], "cannot be found from this example"),
    ],
)
def test_what_depends_on_the_longest_row_is_refused(read, lengths, says):
    model = Packed(nn.LSTM, read, total=False).eval()
    with pytest.raises(UnsupportedModelError, match=says) as caught:
        eecompile(model, "branchy", example_inputs=(batch(4)[0], torch.tensor(lengths)))
    assert "total_length=x.size(1)" in str(caught.value)


def test_the_functions_come_back_after_an_error():
    code, inside = rnn.pack_padded_sequence.__code__, []

    def failing() -> None:
        with sequences.padded():
            inside.append(rnn.pack_padded_sequence.__code__)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing()
    assert inside != [code]
    assert rnn.pack_padded_sequence.__code__ is code
    assert not [name for name in vars(rnn) if "eecompile" in name]
