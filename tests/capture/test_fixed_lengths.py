"""Models whose own code keeps to one length: the refusal names the line, and the blocks front end takes every length."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from eecompile import CaptureError, eecompile, load, strategies
from tests.capture.nets import Block
from tests.support import CLOSED, both, close


class Tokens(nn.Module):
    """[B, S] to [B, 4]; subclasses mix the positions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.emb = nn.Embedding(50, 16)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.out = nn.Linear(16, 4)

    def mix(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, ids: Tensor) -> Tensor:
        x = self.mix(self.emb(ids))
        for block in self.blocks:
            x = block(x)
        y: Tensor = self.out(x.mean(1))
        return y


class Looped(Tokens):
    def mix(self, x: Tensor) -> Tensor:
        state = torch.zeros_like(x[:, 0])
        steps = []
        for t in range(x.shape[1]):
            state = torch.tanh(state + x[:, t])
            steps.append(state)
        return torch.stack(steps, 1)


class Chunked(Tokens):
    def mix(self, x: Tensor) -> Tensor:
        chunks = [x[:, i : i + 4].cumsum(1) for i in range(0, x.shape[1], 4)]
        return torch.cat(chunks, 1)


class Tabled(Tokens):
    """A table of positions that is made in Python."""

    def mix(self, x: Tensor) -> Tensor:
        return x + torch.tensor([i / (i + 1) for i in range(x.shape[1])]).unsqueeze(1)


def tokens(*shape: int) -> Tensor:
    return torch.randint(0, 50, shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize(
    ("kind", "line"), [(Looped, "for t in range"), (Chunked, "for i in range"), (Tabled, "range(x.shape[1])")]
)
def test_another_length_is_refused_with_the_line(kind: Callable[[], nn.Module], line: str, tmp_path):
    model = kind().eval()
    fast = eecompile(model, strategies.Branchy(exits=1), example_inputs=(tokens(4, 8),))
    fast.save(tmp_path / "program")
    for one in (fast, load(tmp_path / "program")):
        one.set_thresholds(CLOSED)
        close(one(tokens(3, 8)), model(tokens(3, 8)))
        with pytest.raises(CaptureError, match="keeps to the length of the example") as caught:
            one(tokens(3, 9))
        text = str(caught.value)
        assert "test_fixed_lengths.py" in text
        assert line in text
        assert 'capture="blocks"' in text
        with pytest.raises(CaptureError, match="does not fit the captured graph"):
            one(tokens(3, 8).float())


def test_blocks_take_every_length():
    model = Chunked().eval()
    fast = eecompile(model, strategies.Branchy(exits=1), example_inputs=(tokens(6, 8),), capture="blocks")
    for rows, s in ((3, 8), (1, 5), (2, 13)):
        fast.set_thresholds(CLOSED)
        close(fast(tokens(rows, s)), model(tokens(rows, s)))
    ids = tokens(8, 11)
    confidence = fast.observe(ids).confidences[0].sort().values
    fast.set_thresholds(float(confidence[3] + confidence[4]) / 2)
    compact, reference = both(fast, ids)
    assert compact.exit_index.tolist().count(0) == 4
    close(compact.output, reference.output)
