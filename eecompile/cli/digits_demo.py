"""`eecompile demo`: a small network on scikit-learn's real digits, from training to a calibrated, faster program."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from rich.console import Console, Group, RenderableType
from rich.text import Text
from torch import Tensor, nn

from eecompile.api import eecompile
from eecompile.cli.data import digits
from eecompile.inspect import where
from eecompile.strategies import Branchy
from eecompile.training.report import Report


class Block(nn.Module):
    """Two 3x3 convolutions with batch norm and a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.body(x))


class DigitsNet(nn.Module):
    """A residual network for 8x8 digits: [B, 1, 8, 8] float32 to [B, 10]."""

    def __init__(self, width: int = 48, blocks: int = 6) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.blocks = nn.Sequential(*(Block(width) for _ in range(blocks)))
        self.classifier = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.classifier(self.blocks(self.stem(x)).mean((2, 3)))
        return found


@dataclass
class DemoReport(Report):
    """All that the demo measured."""

    title: ClassVar[str] = "demo"

    data: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return self.data

    def __rich__(self) -> RenderableType:
        d = self.data
        time_ratio = d["benchmark"]["rows"][1]["ratio"]
        verdict = (
            f"{1 / time_ratio:.2f} times as fast as the original at batch {d['benchmark']['batch']}"
            if time_ratio < 1
            else f"no time saved at this size ({time_ratio:.2f}x): decisions cost more than the work they avoid"
        )
        return Group(
            Text(
                f"accuracy {d['accuracy']:.2%} against {d['full_accuracy']:.2%} of the full model, at "
                f"{d['mean_cost']:.1%} of its FLOPs; {verdict}",
                style="bold",
            )
        )


def train(model: nn.Module, epochs: int) -> None:
    """Plain training of the original: nothing of early exit in it."""
    data = digits("train")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(data))
    model.train()
    for _ in range(epochs):
        for x, y in data:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    model.eval()


def picture(image: Tensor) -> str:
    """An 8x8 digit in characters."""
    shades = " .:+*#@"
    rows = image.squeeze(0).clamp(0, 1).mul(len(shades) - 1).round().long().tolist()
    return "\n".join("".join(shades[v] * 2 for v in row) for row in rows)


def demonstrate(screen: Console | None) -> tuple[Any, DemoReport]:
    """Runs the demo; prints as it goes where a screen is given."""

    def say(thing: Any) -> None:
        if screen is not None:
            screen.print(thing)

    start = time.perf_counter()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = DigitsNet()
        say("[bold]1. Train a residual network on real digits[/bold] (plain PyTorch)")
        train(model, epochs=6)
        x = torch.cat([b for b, _ in digits("train")])
        say("[bold]2. Compile it:[/bold] eecompile(model, Branchy(exits=[0.2, 0.5]))")
        fast = eecompile(model, Branchy(exits=(0.2, 0.5), head="linear"), example_inputs=(x[:8],))
        say("[bold]3. Train the exits; the network itself stays as it is[/bold]")
        fitted = fast.fit(digits("train"), epochs=15, lr=1e-2, progress=False)
        say("[bold]4. Calibrate:[/bold] at most 1% accuracy lost, with 95% confidence, on other digits")
        calibrated = fast.calibrate(digits("val"), max_drop=0.01, delta=0.05)
        say(calibrated)
        say("[bold]5. Evaluate once on digits never used before[/bold]")
        evaluated = fast.evaluate(digits("test"))
        say(evaluated)
        test = torch.cat([b for b, _ in digits("test")])
        say("[bold]6. Where some inputs left, and why[/bold]")
        seen = fast.run(test)
        shown = _early_and_late(seen.exit_index)
        for row in shown:
            say(Text(picture(test[row]) + f"\nleft at {_name(fast, int(seen.exit_index[row]))}"))
        say(where(fast, test[shown]))
        say("[bold]7. The rewritten program[/bold]")
        say(fast.explain())
        say("[bold]8. Time against the original, interleaved[/bold]")
        timed = fast.benchmark(test[:256], rounds=7)
        say(timed)
    found = evaluated.to_dict()
    report = DemoReport(
        {
            "accuracy": float((fast.prediction_of(seen.output).argmax(-1) == _labels()).float().mean()),
            "full_accuracy": float((fast.full(test).argmax(-1) == _labels()).float().mean()),
            "mean_cost": float(seen.cost.mean()),
            "fit": fitted.to_dict(),
            "calibration": calibrated.to_dict(),
            "evaluation": found,
            "benchmark": timed.to_dict(),
            "seconds": time.perf_counter() - start,
        }
    )
    say(report)
    return fast, report


def _labels() -> Tensor:
    return torch.cat([y for _, y in digits("test")])


def _name(fast: Any, index: int) -> str:
    return fast.exits[index].name if index < len(fast.exits) else "the model's own end"


def _early_and_late(exit_index: Tensor) -> list[int]:
    """Rows of one early and one late leaver."""
    return sorted({int(exit_index.argmin()), int(exit_index.argmax())})
