"""`demo`: a model from training to a measured early-exit program, on real digits, in under a minute."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from eecompile.cli import options as o
from eecompile.cli.out import Out, reporting

if TYPE_CHECKING:
    from rich.table import Table
    from torch import Tensor

    from eecompile import CompiledModule

TRAIN, CALIBRATE = 797, 650  # of 1,797 digits; the 350 others are the test
EPOCHS, FIT_EPOCHS, ROUNDS = 20, 8, 9
MAX_DROP, DELTA = 0.01, 0.05
SHADES = " .:-=+*#%@"
SHOWN = 4


def demo(
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="DIR", help="Save the program here.")] = None,
    threads: Annotated[int, typer.Option(help="Threads of torch; so small a network is quickest on one.")] = 1,
    seed: o.Seed = 0,
    as_json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Train a small network on handwritten digits, compile it, fit, calibrate, and measure what it gains.

    Needs scikit-learn for the digits: pip install 'eecompile[demo]'. Nothing is downloaded.
    """
    with reporting(as_json) as out:
        import torch

        from eecompile.artifact.files import free_place
        from eecompile.cli import data, models

        if output is not None:
            free_place(output)
        images, labels = data.digit_images()
        before = torch.get_num_threads()
        models.threads(threads)
        try:
            _Demo(out, images, labels, seed, output).run()
        finally:
            torch.set_num_threads(before)


class _Demo:
    """The steps, in order; each says what it does on standard error and what it found on standard output."""

    def __init__(self, out: Out, images: Tensor, labels: Tensor, seed: int, output: Path | None) -> None:
        import torch

        self.out, self.seed, self.output = out, seed, output
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        parts = torch.split(order, [TRAIN, CALIBRATE, len(order) - TRAIN - CALIBRATE])
        self.train, self.calibration, self.test = ((images[p], labels[p]) for p in parts)
        self.start = time.perf_counter()

    def run(self) -> None:
        from eecompile.inspect import render, where

        sizes = ", ".join(f"{len(p[1])} to {use}" for p, use in self.parts())
        self.say(f"1,797 handwritten digits of 8 x 8 pixels: {sizes}")
        model = self.trained()
        fast = self.compiled(model)
        self.say("fit: train the exits' heads on the frozen network")
        fitted = fast.fit(self.loader(self.train, 64, True), epochs=FIT_EPOCHS, lr=3e-3, seed=self.seed, progress=False)
        self.say(f"calibrate: thresholds for a drop of at most {MAX_DROP:.0%}, sure to {1 - DELTA:.0%}")
        calibrated = fast.calibrate(self.loader(self.calibration), max_drop=MAX_DROP, delta=DELTA, seed=self.seed)
        self.say("evaluate: the test part, for the first time")
        evaluated = fast.evaluate(self.loader(self.test))
        departures = where(fast, self.test[0])
        self.say("bench: time against the original, in turns")
        times = measured(fast, model, self.test[0])
        self.out.show("", "The rewritten program", render(fast))
        self.out.show("", calibrated, "", evaluated, "", "Where some digits left, and why", self.pictures(departures))
        self.out.show("", benchmark_table(times), *verdict(times, evaluated))
        if self.output is not None:
            fast.save(self.output)
            self.out.after(self.output, f"eecompile run {self.output} --data digits:test")
        seconds = time.perf_counter() - self.start
        self.out.show("", f"The whole demo took {seconds:.1f} s.")
        self.out.result(
            {
                "seconds": seconds,
                "rows": {use: len(p[1]) for p, use in self.parts()},
                "fit": fitted.to_dict(),
                "calibration": calibrated.to_dict(),
                "evaluation": evaluated.to_dict(),
                "departures": departures.to_dict()["rows"][:SHOWN],
                "benchmark": times,
                "program": fast.explain().to_dict(),
                "saved": None if self.output is None else str(self.output),
            }
        )

    def parts(self) -> list[tuple[tuple[Tensor, Tensor], str]]:
        return [(self.train, "train"), (self.calibration, "calibrate"), (self.test, "test")]

    def say(self, text: str) -> None:
        self.out.say(f"[{time.perf_counter() - self.start:5.1f} s] {text}")

    def loader(self, part: tuple[Tensor, Tensor], batch: int = 128, shuffle: bool = False) -> Any:
        import torch
        from torch.utils.data import DataLoader, TensorDataset

        generator = torch.Generator().manual_seed(self.seed)
        return DataLoader(TensorDataset(*part), batch, shuffle=shuffle, generator=generator)

    def trained(self) -> Any:
        import torch

        from eecompile.cli.digits_net import DigitsNet, train

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = DigitsNet()
        count = sum(p.numel() for p in model.parameters())
        self.say(f"train: an ordinary residual network, {count:,} parameters, {EPOCHS} epochs")

        def progress(epoch: int, loss: float) -> None:
            if epoch % 5 == 0:
                self.say(f"  epoch {epoch}, loss {loss:.3f}")

        train(model, *self.train, epochs=EPOCHS, seed=self.seed, progress=progress)
        return model

    def compiled(self, model: Any) -> CompiledModule:
        from eecompile import eecompile

        self.say('compile: eecompile(model, "branchy", example_inputs=(x,))')
        return eecompile(model, "branchy", example_inputs=(self.train[0][:4],), seed=self.seed)

    def pictures(self, departures: Any) -> Table:
        """A few digits with what every exit said of them: the first to leave at each exit, then others."""
        from rich.table import Table
        from rich.text import Text

        chosen = {r.left_at: r for r in reversed(departures.rows)}
        rows = sorted(chosen.values(), key=lambda r: r.cost)
        rows += [r for r in departures.rows if r not in rows][: max(0, SHOWN - len(rows))]
        table = Table(show_lines=True)
        table.add_column("input", no_wrap=True)
        table.add_column("what happened")
        for r in rows:
            label = int(self.test[1][r.row])
            right = "right" if r.prediction == label else f"wrong, it is a {label}"
            lines = [f"prediction {r.prediction} ({right}), exit {r.left_at}, cost {r.cost:.0%} of the model", r.why]
            lines.append("; ".join(f"{a.exit} predicts {a.prediction} ({a.confidence:.3f})" for a in r.exits if a.open))
            table.add_row(Text(picture(self.test[0][r.row, 0])), Text("\n".join(lines)))
        return table


def picture(image: Tensor) -> str:
    """[8, 8] as text, two characters for a pixel."""
    grey = image - image.min()
    levels = (grey / grey.max().clamp(min=1e-6) * (len(SHADES) - 1)).round().int().tolist()
    return "\n".join("".join(SHADES[v] * 2 for v in line) for line in levels)


def measured(fast: CompiledModule, model: Any, images: Tensor) -> list[dict[str, Any]]:
    """Milliseconds a row of the original and of the program, row by row and in batches, all of the same rows."""
    import torch

    from eecompile.benchmark import interleaved, summary

    found = []
    for batch, rows in ((1, 64), (32, 320), (len(images), len(images))):
        chunks = torch.split(images[:rows], batch)

        def through(module: Any, chunks: Any = chunks) -> None:
            for chunk in chunks:
                module(chunk)

        with torch.no_grad():
            times = interleaved({"original": lambda: through(model), "eecompile": lambda: through(fast)}, ROUNDS)
            cost = float(torch.cat([fast.run(c).cost for c in chunks]).mean())
        original, spread = summary(times["original"])
        early, early_spread = summary(times["eecompile"])
        found.append(
            {
                "batch": batch,
                "rows": rows,
                "original_ms": 1e3 * original / rows,
                "original_spread_ms": 1e3 * spread / rows,
                "eecompile_ms": 1e3 * early / rows,
                "eecompile_spread_ms": 1e3 * early_spread / rows,
                "ratio": early / original,
                "mean_cost": cost,
            }
        )
    return found


def benchmark_table(times: list[dict[str, Any]]) -> Table:
    """Time by batch size against the cost in FLOPs, which the time would be if arithmetic were all."""
    import torch
    from rich.table import Table
    from rich.text import Text

    title = f"ms a row, median of {ROUNDS} rounds in turns, {torch.get_num_threads()} threads, executor compact"
    table = Table(title=Text(title), title_justify="left")
    for column in ("batch", "rows", "original", "eecompile", "time", "FLOPs"):
        table.add_column(column, justify="right")
    for t in times:
        table.add_row(
            str(t["batch"]),
            str(t["rows"]),
            f"{t['original_ms']:.4f} +- {t['original_spread_ms']:.4f}",
            f"{t['eecompile_ms']:.4f} +- {t['eecompile_spread_ms']:.4f}",
            f"{t['ratio']:.2f} x",
            f"{t['mean_cost']:.2f} x",
        )
    return table


def verdict(times: list[dict[str, Any]], evaluated: Any) -> list[str]:
    """What the numbers say, the bad ones too."""
    said = [
        f"On {evaluated.samples} digits that nothing was chosen on: accuracy {evaluated.accuracy:.2%} against "
        f"{evaluated.full_accuracy:.2%} of the full network, at {evaluated.mean_cost:.0%} of its FLOPs."
    ]
    faster = [t for t in times if t["ratio"] < 0.98]
    slower = [t for t in times if t["ratio"] >= 0.98]
    if faster:
        said.append("Faster: " + ", ".join(f"{1 / t['ratio']:.1f} times at batch {t['batch']}" for t in faster) + ".")
    if slower:
        said.append(
            "Not faster at batch "
            + ", ".join(str(t["batch"]) for t in slower)
            + ": the network is so small here that fixed costs of each operator and decision outweigh the arithmetic saved."
        )
    gap = [t for t in faster if t["ratio"] > t["mean_cost"] + 0.05]
    if gap:
        said.append(
            "The time falls less than the FLOPs: heads, decisions and gathering cost time of their own, and the few "
            "rows that stay make small, inefficient batches. Larger models come closer to the FLOPs."
        )
    return said
