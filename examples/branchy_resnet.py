"""B-ResNet (Teerapittayanon et al. 2016): ResNet-20 on CIFAR-10 with branches after blocks of all three stages.

Early feature maps are fine and know little of the whole image, so a branch halves the map and doubles the channels as
the trunk's own stages do, down to 4 x 4, before it averages (`Branch`). Exits may stand closer than any one choice of
thresholds needs: a closed exit costs nothing, and calibration opens those that pay. The trunk, trained as usual before,
is trained on together with its branches from a high learning rate, as in a warm restart: early layers have to learn what
branches can read. Branches learn labels and the model's own output. On the trunk as it was, branches are right on 68 to
86% of the images, and a loss of 1 point guaranteed leaves 81% of the FLOPs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from eecompile import eecompile
from eecompile.heads import Site
from eecompile.strategies import Branchy
from examples import datasets
from examples._common import (
    Options,
    Record,
    evaluated,
    fitted,
    main,
    observed,
    resnet_trunk,
    rows_in,
    rows_of,
    timed,
    timed_as_onnx,
)

EXITS = ("stage1.1", "stage2.0", "stage2.1", "stage3.0")
EXITS_QUICK = ("stage1", "stage2")  # of ResNet-8, one block a stage
SIZES = (1, 32, 64)
EPOCHS, EPOCHS_QUICK = 16, 2


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


def sgd(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """What the trunk itself was trained by."""
    return torch.optim.SGD(groups, momentum=0.9, nesterov=True)


def example(options: Options, record: Record) -> None:
    """From training to timing."""
    quick = options.quick
    trunk = resnet_trunk(quick=quick, seed=options.seed)
    batch = 16 if quick else 128
    train = datasets.loader("cifar10:train", batch_size=batch, standin=quick, seed=options.seed, augmented=not quick)
    held_out = {part: datasets.loader(f"cifar10:{part}", standin=quick) for part in ("val", "test")}
    x: Tensor = next(iter(held_out["val"]))[0][:8]
    exits = EXITS_QUICK if quick else EXITS
    weights = [1.0] * len(exits) + [2.0]
    strategy = Branchy(exits=exits, head=Branch, weights=weights, distillation=0.5, trunk=True)
    trained = resnet_trunk(quick=quick, seed=options.seed).model.to(memory_format=torch.channels_last)  # faster, on a CPU
    fast = eecompile(trained, strategy, example_inputs=(x,))
    fit = fitted(
        fast,
        train,
        "branchy-resnet",
        options,
        trunk,
        epochs=EPOCHS_QUICK if quick else EPOCHS,
        lr=0.1,
        trunk_lr=0.1,
        weight_decay=5e-4,
        optimizer=sgd,
        scheduler="cosine",
    )
    fast.to(memory_format=torch.contiguous_format)
    sizes = {"train": rows_in(train)} | {part: rows_in(loader) for part, loader in held_out.items()}
    model = f"{type(trunk.model).__name__}, {sum(p.numel() for p in trunk.model.parameters()):,} parameters"
    record.note(data="CIFAR-10", rows_of_data=sizes, model=model, trunk=trunk.to_dict(), fit=fit)
    record.done("train")
    seen = observed(fast, held_out)
    variants = evaluated(fast, seen, record, "CIFAR-10, ResNet-20", trunk.accuracy)
    record.done("evaluate")
    x = rows_of(held_out["test"], 4)
    timed(record, trunk.model, x, variants, SIZES)
    timed_as_onnx(record, x, variants, SIZES)


if __name__ == "__main__":
    main("branchy_resnet", __doc__, example)
