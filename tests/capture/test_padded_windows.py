"""Models that pad their input to a multiple of a window: every length is answered, whichever side the example took."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eecompile import CaptureError, eecompile, load, strategies
from tests.support import CLOSED, both, close

WINDOW = 4


class Windows(nn.Module):
    """Tokens [B, S] to [B, 4]: mixes within windows of 4 positions; `form` says how the forward pads."""

    def __init__(self, form: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.form = form
        self.emb = nn.Embedding(50, 8)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.1)) for _ in range(3))
        self.out = nn.Linear(8, 4)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.emb(ids)
        b, s, d = x.shape
        if self.form == "branch" and (pad := -s % WINDOW):
            x = F.pad(x, (0, 0, 0, pad))
        elif self.form == "loop":
            if s % WINDOW != 0:
                x = torch.cat((x, x.new_zeros(b, WINDOW - s % WINDOW, d)), 1)
        elif self.form == "twice" and s % WINDOW:  # not what the other side computes
            x = 2 * F.pad(x, (0, 0, 0, -s % WINDOW))
        for layer in self.layers:
            h = x.reshape(b, -1, WINDOW, d)
            x = x + layer((h - h.mean(2, keepdim=True)).reshape(b, -1, d)).relu()
        y: Tensor = self.out(x[:, :s].amax(1))
        return y


def tokens(*shape: int) -> Tensor:
    return torch.randint(0, 50, shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize(("form", "length"), [("branch", 12), ("branch", 10), ("loop", 8)])
def test_all_lengths_are_answered(form, length, tmp_path):
    model = Windows(form).eval()
    fast = eecompile(model, strategies.Branchy(exits=1), example_inputs=(tokens(6, length),))
    fast.save(tmp_path / "program")
    back = load(tmp_path / "program")
    for rows, s in ((5, 8), (3, 9), (1, 13), (1, 1)):
        ids = tokens(rows, s)
        for one in (fast, back):
            one.set_thresholds(CLOSED)
            close(one(ids), model(ids))
    ids = tokens(8, 13)  # the length is read from the ids again by the rows that stay
    confidence = fast.observe(ids).confidences[0].sort().values
    fast.set_thresholds(float(confidence[3] + confidence[4]) / 2)
    compact, reference = both(fast, ids)
    assert compact.exit_index.tolist().count(0) == 4
    assert torch.equal(compact.exit_index, reference.exit_index)
    close(compact.output, reference.output)


def test_gates_read_the_length_from_the_input():
    model = Windows("branch").eval()
    fast = eecompile(model, strategies.SkipNet(unit="linear"), example_inputs=(tokens(6, 12),))
    ids = tokens(8, 13)
    fast.set_gate_thresholds(0.0)
    close(fast(ids), model(ids))
    scores = fast.observe(ids).trace.gate_scores.sort(0).values
    fast.set_gate_thresholds(((scores[3] + scores[4]) / 2).tolist())
    compact, reference = both(fast, ids)
    assert torch.equal(compact.gates, reference.gates)
    close(compact.output, reference.output)


def test_the_trunk_is_trained_at_all_lengths():
    batches = [(tokens(6, s), torch.arange(6) % 4) for s in (12, 13, 9)]
    fast = eecompile(Windows("branch").eval(), strategies.Branchy(exits=1, trunk=True), example_inputs=(tokens(6, 12),))
    report = fast.fit(batches, epochs=1, progress=False)
    assert len(report.rows) == 1


def test_another_computation_on_the_other_side_is_refused():
    model = Windows("twice").eval()
    for length, other in ((12, 13), (13, 12)):
        fast = eecompile(model, strategies.Branchy(exits=1), example_inputs=(tokens(6, length),))
        fast.set_thresholds(CLOSED)
        close(fast(tokens(3, length)), model(tokens(3, length)))
        with pytest.raises(CaptureError, match="another branch"):
            fast(tokens(3, other))


def test_height_and_width():
    class Image(nn.Module):
        """[B, 3, H, W] to [B, 4], with windows of 4 x 4 as in Swin."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layers = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
            self.out = nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            h, w = x.shape[2:]
            if h % WINDOW or w % WINDOW:
                x = F.pad(x, (0, -w % WINDOW, 0, -h % WINDOW))
            for layer in self.layers:
                x = x + layer(F.avg_pool2d(x, WINDOW).repeat_interleave(WINDOW, 2).repeat_interleave(WINDOW, 3)).relu()
            y: Tensor = self.out(x[:, :, :h, :w].mean((2, 3)))
            return y

    model = Image().eval()
    sizes = {"x": {2: "height", 3: "width"}}
    fast = eecompile(
        model, strategies.Branchy(exits=1, head="linear"), example_inputs=(torch.randn(4, 3, 8, 12),), dynamic=sizes
    )
    fast.set_thresholds(CLOSED)
    for h, w in ((8, 12), (9, 13), (12, 8), (8, 8)):
        x = torch.randn(2, 3, h, w)
        close(fast(x), model(x))
