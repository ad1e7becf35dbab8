"""Early exits for a time series: a convolutional network tells the state of a process from 60 readings.

The data are control charts, generated (`examples/generated.py`). Maps over time are [B, C, T]; the branches here read such a
map in 6 pieces, and learn labels and the trunk's own output. The trunk stays as it is. Thresholds are chosen on the
validation part, once with a guarantee, once as the cheapest that lose at most 1% there.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from eecompile import eecompile
from eecompile.heads import Site
from eecompile.strategies import Branchy
from examples import generated
from examples._common import Options, Record, evaluated, fitted, main, observed, rows_in, rows_of, timed
from examples.trunks import charts_trunk

PIECES = 6
SIZES = (1, 32, 256)


class Branch(nn.Module):
    """[B, C, T] to [B, classes]: the mean over each of 6 pieces of time, one linear layer."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.classifier = nn.Linear(int(site.sizes[1]) * PIECES, site.classes)

    def forward(self, h: Tensor) -> Tensor:
        logits: Tensor = self.classifier(nn.functional.adaptive_avg_pool1d(h, PIECES).flatten(1))
        return logits


def example(options: Options, record: Record) -> None:
    """From training to timing."""
    quick = options.quick
    trunk = charts_trunk(quick=quick, seed=options.seed)
    draw = generated.data(generated.control_charts, quick)
    parts = {part: DataLoader(TensorDataset(*draw(part, None)), 128, shuffle=part == "train") for part in generated.SIZES}
    x: Tensor = next(iter(parts["val"]))[0][:8]
    strategy = Branchy(exits=("layers.0", "layers.1", "layers.2"), head=Branch, distillation=0.5)
    fast = eecompile(trunk.model, strategy, example_inputs=(x,))
    fit = fitted(
        fast, parts["train"], "branchy-charts", options, trunk, epochs=3 if quick else 6, lr=1e-2, scheduler="cosine"
    )
    sizes = {part: rows_in(loader) for part, loader in parts.items()}
    record.note(data="control charts, generated", rows_of_data=sizes, model="ChartNet", trunk=trunk.to_dict(), fit=fit)
    record.done("train")
    seen = observed(fast, {part: parts[part] for part in ("val", "test")})
    variants = evaluated(fast, seen, record, "control charts, 4 convolutions", trunk.accuracy)
    record.done("evaluate")
    timed(record, trunk.model, rows_of(parts["test"], 4), variants, SIZES)


if __name__ == "__main__":
    main("branchy_charts", __doc__, example)
