"""Networks of convolutions over time: heads, gate units and policies find positions on the last axis."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from eecompile.heads import Site
from tests.support import compiled


class OverTime(nn.Module):
    """Tokens [B, S] and their mask through convolutions over time, [B, D, S] between them."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        layers = [nn.Conv1d(8, 8, 3, padding=1) for _ in range(3)]
        self.blocks = nn.ModuleList(nn.Sequential(c, nn.BatchNorm1d(8), nn.ReLU()) for c in layers)
        self.classifier = nn.Linear(8, classes)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        x = self.embed(tokens).transpose(1, 2)
        for block in self.blocks:
            x = x + block(x)
        weight = mask.unsqueeze(1).to(x.dtype)
        return self.classifier((x * weight).sum(-1) / weight.sum(-1))


@pytest.mark.parametrize("strategy", ["branchy", "skipnet", "self_adaptive"])
def test_positions_come_last_after_convolutions_over_time(strategy: str) -> None:
    """Heads and units pool over time, without the padding: what is padded there does not change a row's answer."""
    torch.manual_seed(0)
    model = OverTime().eval()
    tokens, mask = torch.randint(1, 20, (4, 9)), torch.ones(4, 9, dtype=torch.long)
    mask[:, 6:] = 0
    fast = compiled(model, strategy, example_kwargs={"tokens": tokens, "mask": mask})
    units = [m for m in fast.graph_module.modules() if isinstance(getattr(m, "site", None), Site)]
    assert units and all(u.site.channels_first and u.site.width == 8 and u.site.masked for u in units)
    for unit in units:
        x, other = torch.randn(4, 8, 9), torch.randn(4, 8, 9)
        other[..., :6] = x[..., :6]
        with torch.no_grad():
            torch.testing.assert_close(unit(x, mask), unit(other, mask))
    with torch.no_grad():
        torch.testing.assert_close(
            fast(tokens=tokens[:, :5], mask=mask[:, :5]).shape, model(tokens[:, :5], mask[:, :5]).shape
        )


def test_heads_are_chosen_and_fitted_where_positions_come_last() -> None:
    """Each kind reads what it reads when it runs, its first position too: more of them (9) than features (8)."""
    torch.manual_seed(0)
    tokens, mask = torch.randint(1, 20, (80, 9)), torch.ones(80, 9, dtype=torch.long)
    data = [({"tokens": tokens[i : i + 16], "mask": mask[i : i + 16]}, tokens[i : i + 16, 0] % 3) for i in range(0, 80, 16)]
    fast = compiled(OverTime().eval(), "branchy", example_kwargs={"tokens": tokens[:4], "mask": mask[:4]})
    report = fast.fit(data, trunk=False, cached=True, progress=False)
    assert all(row.loss < 1.2 for row in report.heads)
