"""B-ResNet (Teerapittayanon et al. 2016): ResNet-20 on CIFAR-10 with branches after blocks of all three stages.

Early feature maps are fine and know little of the whole image, so a branch halves the map and doubles the channels as
the trunk's own stages do, down to 4 x 4, before it averages (`Branch`). Exits may stand closer than any one choice of
thresholds needs: a closed exit costs nothing, and calibration opens those that pay. The trunk, trained as usual before,
stays as it is; branches learn labels and the trunk's own output, each alone. Trained on together with its branches for 3
passes, a trunk of 89.2% ended at 87.6% and saved no more.
"""

from __future__ import annotations

from torch import Tensor, nn

from eecompile import eecompile
from eecompile.heads import Site
from eecompile.strategies import Branchy
from examples import datasets
from examples._common import Options, Record, evaluated, fitted, main, observed, resnet_trunk, rows_in, rows_of, timed

EXITS = ("stage1.0", "stage1.2", "stage2.1", "stage3.0")
EXITS_QUICK = ("stage1", "stage2")  # of ResNet-8, one block a stage
SIZES = (1, 32, 256)


class Branch(nn.Module):
    """[B, C, H, W] to [B, classes]: 3 x 3 convolutions of stride 2 down to 4 x 4, the mean, one linear layer."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        channels, side = site.width, int(site.sizes[2])
        layers: list[nn.Module] = []
        while side > 4:
            layers += [nn.Conv2d(channels, 2 * channels, 3, 2, 1, bias=False), nn.BatchNorm2d(2 * channels), nn.ReLU()]
            channels, side = 2 * channels, -(-side // 2)
        self.convolutions = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, site.classes)

    def forward(self, h: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.convolutions(h).mean((2, 3)))
        return logits


def example(options: Options, record: Record) -> None:
    """From training to timing."""
    quick = options.quick
    trunk = resnet_trunk(quick=quick, seed=options.seed)
    batch = 16 if quick else 128
    train = datasets.loader("cifar10:train", batch_size=batch, standin=quick, seed=options.seed, augmented=not quick)
    held_out = {part: datasets.loader(f"cifar10:{part}", standin=quick) for part in ("val", "test")}
    x: Tensor = next(iter(held_out["val"]))[0][:8]
    strategy = Branchy(exits=EXITS_QUICK if quick else EXITS, head=Branch, distillation=0.5)
    fast = eecompile(trunk.model, strategy, example_inputs=(x,))
    fit = fitted(
        fast,
        train,
        "branchy-resnet",
        options,
        trunk,
        epochs=2 if quick else 3,
        lr=3e-3,
        scheduler="cosine",
        bf16=not quick,
    )
    sizes = {"train": rows_in(train)} | {part: rows_in(loader) for part, loader in held_out.items()}
    model = f"{type(trunk.model).__name__}, {sum(p.numel() for p in trunk.model.parameters()):,} parameters"
    record.note(data="CIFAR-10", rows_of_data=sizes, model=model, trunk=trunk.to_dict(), fit=fit)
    record.done("train")
    seen = observed(fast, held_out)
    variants = evaluated(fast, seen, record, "CIFAR-10, ResNet-20", trunk.accuracy)
    record.done("evaluate")
    timed(record, trunk.model, rows_of(held_out["test"], 4), variants, SIZES)


if __name__ == "__main__":
    main("branchy_resnet", __doc__, example)
