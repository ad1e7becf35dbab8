"""The trunks of the examples: models trained as usual, with no early exit in them, each trained once and kept.

A trunk is found by its `Recipe`. Small ones are shipped in ``examples/weights`` with their curves. Others are kept,
with their accuracy and the seconds that they took, in ``$EECOMPILE_RUNS`` (or ``~/.cache/eecompile/runs``); training
that was stopped goes on from its last checkpoint. ``python -m examples.trunks resnet20 minilm`` trains what is not
there yet, without a name all; ``--ship`` also writes ``examples/weights/NAME.safetensors`` and ``NAME.json`` (delete
them to train again).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from examples import datasets, generated, models
from examples._registry import DatasetError, atomic
from examples.generated import IGNORE

Inputs = Tensor | dict[str, Tensor]
WEIGHTS = Path(__file__).parent / "weights"
console = Console(stderr=True)


def runs_root() -> Path:
    """The folder for what was trained: ``$EECOMPILE_RUNS`` or ``~/.cache/eecompile/runs``."""
    named = os.environ.get("EECOMPILE_RUNS")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "eecompile" / "runs"


def accuracy(model: nn.Module, loader: DataLoader[Any] | Iterator[Any]) -> float:
    """Share of right answers over batches of ``(inputs, labels)`` or dictionaries with ``labels``; -100 is left out."""
    right = total = 0
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for batch in loader:
            if isinstance(batch, dict):
                inputs, labels = {k: v for k, v in batch.items() if k != "labels"}, batch["labels"]
            else:
                inputs, labels = batch
            right += int((_logits(model, inputs).argmax(-1) == labels).sum())
            total += int((labels != IGNORE).sum())
    model.train(was_training)
    if not total:
        raise DatasetError("accuracy: the loader yielded no batch, wanted at least one")
    return right / total


def _logits(model: nn.Module, inputs: Inputs) -> Tensor:
    out = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return out if isinstance(out, Tensor) else out.logits


# ---- training


@dataclass(frozen=True)
class Recipe:
    """How a trunk is trained; with the name, what a kept trunk is found by."""

    name: str
    epochs: int
    batch_size: int
    lr: float
    optimizer: Literal["adamw", "sgd"] = "adamw"
    weight_decay: float = 0.01
    moved: int = 0  # pixels that images are moved by at most, anew each time
    mirrored: bool = False  # half of the time
    label_smoothing: float = 0.0
    small: tuple[tuple[int, int], ...] = ()  # (epochs, pixels) at the start, on images made smaller; then as they are
    channels_last: bool = False
    bf16: bool = False  # mixed precision, where the processor has units for it
    seed: int = 0
    rows: int | None = None  # training rows; None for all
    standin: bool = False
    start: Recipe | None = None  # of the trunk whose weights are trained on; None for fresh ones

    @property
    def path(self) -> Path:
        """Where the trunk is kept."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:8]
        return runs_root() / f"{self.name}-{digest}.safetensors"

    @property
    def shipped(self) -> Path | None:
        """The trunk in ``examples/weights``, where one of these very settings is there."""
        path = WEIGHTS / f"{self.name}.json"
        same = path.exists() and json.loads(path.read_text())["recipe"] == json.loads(json.dumps(asdict(self)))
        return path.with_suffix(".safetensors") if same else None

    def pixels(self, epoch: int) -> int | None:
        """Height and width of the images in ``epoch``, from 0; None as they are."""
        for epochs, pixels in self.small:
            if epoch < epochs:
                return pixels
            epoch -= epochs
        return None


@dataclass(frozen=True)
class Trunk:
    """A trained model, its accuracy on the validation and test parts, and the seconds of training."""

    model: nn.Module
    val_accuracy: float
    accuracy: float
    seconds: float
    path: Path
    recipe: Recipe
    curve: list[dict[str, float]] = field(default_factory=list)  # of each epoch: loss, validation accuracy, seconds so far

    def to_dict(self) -> dict[str, Any]:
        """The record without the model, for a result's JSON."""
        return {
            "recipe": asdict(self.recipe), "val_accuracy": self.val_accuracy, "accuracy": self.accuracy,
            "seconds": self.seconds, "curve": self.curve,
        }  # fmt: skip


def take(inputs: Inputs, index: Tensor) -> Inputs:
    """The rows ``index`` of every tensor."""
    return {k: v[index] for k, v in inputs.items()} if isinstance(inputs, dict) else inputs[index]


def _optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), recipe.lr, momentum=0.9, weight_decay=recipe.weight_decay, nesterov=True)
    return torch.optim.AdamW(model.parameters(), recipe.lr, weight_decay=recipe.weight_decay)


def _precision(recipe: Recipe) -> Any:
    able = torch.cpu.get_capabilities()
    wanted = recipe.bf16 and bool(able.get("amx_bf16") or able.get("avx512_bf16"))
    return torch.autocast("cpu", torch.bfloat16) if wanted else nullcontext()


def _prepared(batch: Inputs, recipe: Recipe, pixels: int | None) -> Inputs:
    """The batch as the model is to see it; other than image batches as they are."""
    if not isinstance(batch, Tensor):
        return batch
    if recipe.moved or recipe.mirrored:
        batch = datasets.augment(batch, pixels=recipe.moved, mirrored=recipe.mirrored)
    if pixels is not None:
        batch = nn.functional.interpolate(batch, (pixels, pixels), mode="bilinear", antialias=True)
    return batch.contiguous(memory_format=torch.channels_last) if recipe.channels_last else batch


def fit_trunk(
    model: nn.Module,
    inputs: Inputs,
    labels: Tensor,
    recipe: Recipe,
    validate: Callable[[], float] | None = None,
    save_every_s: float = 60.0,
) -> tuple[float, list[dict[str, float]]]:
    """Train ``model`` in place; gives the seconds and the curve, a row for each epoch.

    A checkpoint is written next to ``recipe.path`` every ``save_every_s`` seconds and after each epoch. After a stop
    the next call goes on from it, with the batches, the augmentation and the dropout of an unbroken run. ``validate``
    is called after each epoch for the accuracy on the validation part.
    """
    state_path = recipe.path.with_suffix(".resume")
    state_path.parent.mkdir(parents=True, exist_ok=True)
    if recipe.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    steps = -(-len(labels) // recipe.batch_size)
    optimizer = _optimizer(model, recipe)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.lr, total_steps=steps * recipe.epochs, pct_start=0.2, cycle_momentum=False
    )
    torch.manual_seed(recipe.seed)
    done, seconds, loss_sum = 0, 0.0, 0.0
    curve: list[dict[str, float]] = []
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        torch.set_rng_state(state["rng"])
        done, seconds, loss_sum, curve = (state[key] for key in ("done", "seconds", "loss_sum", "curve"))
        console.print(f"{recipe.name}: going on after step {done} of {steps * recipe.epochs}")

    def save() -> None:
        with atomic(state_path) as written:
            parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "schedule": schedule}
            state: dict[str, Any] = {name: part.state_dict() for name, part in parts.items()}
            state |= {"rng": torch.get_rng_state(), "done": done, "loss_sum": loss_sum, "curve": curve}
            torch.save({**state, "seconds": seconds + time.perf_counter() - start}, written)

    model.train()
    start = saved = time.perf_counter()
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task(recipe.name, total=steps * recipe.epochs, completed=done)
        try:
            for epoch in range(done // steps, recipe.epochs):
                order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(recipe.seed * 1000 + epoch))
                for step in range(done - epoch * steps, steps):
                    index = order[step * recipe.batch_size : (step + 1) * recipe.batch_size]
                    batch = _prepared(take(inputs, index), recipe, recipe.pixels(epoch))
                    with _precision(recipe):
                        logits = _logits(model, batch).float()
                    wanted = labels[index].flatten()
                    loss = nn.functional.cross_entropy(logits.flatten(0, -2), wanted, label_smoothing=recipe.label_smoothing)
                    optimizer.zero_grad(set_to_none=True)
                    loss.backward()  # type: ignore[no-untyped-call]
                    nn.utils.clip_grad_norm_(model.parameters(), 5.0)
                    optimizer.step()
                    schedule.step()
                    done += 1
                    loss_sum += loss.item()
                    progress.advance(bar)
                    if step + 1 < steps and time.perf_counter() - saved > save_every_s:
                        save()
                        saved = time.perf_counter()
                row = {"epoch": epoch + 1, "loss": round(loss_sum / steps, 5)}
                if validate is not None:
                    row["val_accuracy"] = validate()
                row["seconds"] = round(seconds + time.perf_counter() - start, 1)
                curve.append(row)
                loss_sum = 0.0
                save()
                said = ", ".join(f"{key} {value:g}" for key, value in row.items())
                console.print(f"{recipe.name}: {said}", soft_wrap=True)
        except KeyboardInterrupt:
            console.print(f"{recipe.name}: stopped; the same command goes on from the last checkpoint")
            raise
    if recipe.channels_last:
        model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    model.eval()
    return seconds + time.perf_counter() - start, curve


def trunk(
    recipe: Recipe,
    build: Callable[[], nn.Module],
    data: Callable[[str, int | None], tuple[Inputs, Tensor]],
) -> Trunk:
    """The trunk of ``recipe``: shipped, kept, or trained now.

    ``build`` makes the untrained model; ``data(part, limit)`` gives inputs, a tensor [N, ...] or a dictionary
    of them, and labels int64 [N].
    """
    torch.manual_seed(recipe.seed)
    model = build()
    path = next((path for path in (recipe.shipped, recipe.path) if path is not None and path.exists()), None)
    if path is None:
        path = recipe.path
        before = None if recipe.start is None else trunk(recipe.start, build, data)
        model = model if before is None else before.model
        inputs, labels = data("train", recipe.rows)
        held_out = data("val", None)
        seconds, curve = fit_trunk(model, inputs, labels, recipe, lambda: accuracy(model, _batches(*held_out)))
        if before is not None:
            seconds, curve = before.seconds + seconds, [*before.curve, *curve]
        record = {"seconds": round(seconds, 1), "curve": curve, "val_accuracy": curve[-1]["val_accuracy"]}
        record["accuracy"] = accuracy(model, _batches(*data("test", None)))
        _write(path, model, record)
        path.with_suffix(".resume").unlink(missing_ok=True)
    try:
        with safe_open(path, framework="pt") as file:
            record = json.loads(file.metadata()["trunk"])
            model.load_state_dict({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
    except (SafetensorError, RuntimeError, KeyError, TypeError) as error:
        raise DatasetError(
            f"{recipe.name}: {path} is not a trunk of these settings ({error}). Delete it and run again."
        ) from error
    return Trunk(model.eval(), path=path, recipe=recipe, **record)


def _write(path: Path, model: nn.Module, record: dict[str, Any]) -> None:
    with atomic(path) as written:
        weights = {key: value.contiguous() for key, value in model.state_dict().items()}
        save_file(weights, written, {"trunk": json.dumps(record)})


def ship(made: Trunk, command: str) -> None:
    """Writes weights and curve to ``examples/weights``."""
    WEIGHTS.mkdir(exist_ok=True)
    record = made.to_dict()
    recipe = record.pop("recipe")
    path = WEIGHTS / f"{made.recipe.name}.safetensors"
    _write(path, made.model, record)
    with atomic(path.with_suffix(".json")) as written:
        written.write_text(json.dumps({"command": command, "recipe": recipe, **record}, indent=1) + "\n")


def _batches(inputs: Inputs, labels: Tensor, size: int = 256) -> Iterator[tuple[Inputs, Tensor]]:
    for index in torch.split(torch.arange(len(labels)), size):
        yield take(inputs, index), labels[index]


# ---- the trunks of the examples

ROWS_OF_REVIEWS = 2_000  # of validation and of test that the trunk is evaluated on


def image_data(name: str, standin: bool) -> Callable[[str, int | None], tuple[Tensor, Tensor]]:
    """The parts of an image set as `trunk` wants them: images float32 [N, C, H, W] and labels int64 [N]."""

    def data(part: str, limit: int | None) -> tuple[Tensor, Tensor]:
        images, labels = datasets.load(name, part, limit, standin=standin).tensors
        return images, labels

    return data


def reviews(quick: bool) -> Callable[[str, int | None], tuple[Inputs, Tensor]]:
    """The parts of IMDB as `trunk` wants them: tokens int64 [N, 128] and labels int64 [N]; the stand-in when quick."""

    def data(part: str, limit: int | None) -> tuple[Inputs, Tensor]:
        most = 256 if quick else None if part == "train" else ROWS_OF_REVIEWS
        columns = dict(datasets.tokens(part, limit or most, standin=quick))
        labels = columns.pop("labels")
        return columns, labels

    return data


def lenet_trunk(name: str = "mnist", *, quick: bool = False, seed: int = 0) -> Trunk:
    """LeNet on ``mnist`` or ``fashion_mnist``."""
    recipe = Recipe(f"lenet-{name}", 16, 128, 4e-3, weight_decay=1e-3, moved=2, channels_last=True, seed=seed)
    if quick:
        recipe = Recipe(f"lenet-{name}-quick", 4, 32, 4e-3, seed=seed, standin=True)
    return trunk(recipe, models.LeNet, image_data(name, quick))


def resnet_trunk(*, quick: bool = False, seed: int = 0) -> Trunk:
    """ResNet-20 on CIFAR-10 (ResNet-8, half as wide, on the stand-in when quick)."""
    first = Recipe(
        "resnet20-cifar10-first", 20, 128, 0.4, "sgd", 5e-4, moved=4, mirrored=True, label_smoothing=0.1,
        small=((10, 24),), channels_last=True, bf16=True, seed=seed,
    )  # fmt: skip
    recipe = replace(first, name="resnet20-cifar10", epochs=18, lr=0.15, small=(), start=first)  # a warm restart
    if quick:
        recipe = Recipe("resnet8-cifar10-quick", 3, 32, 0.2, "sgd", 5e-4, seed=seed, standin=True)
    return trunk(recipe, models.resnet8 if quick else models.resnet20, image_data("cifar10", quick))


def resnet8_trunk(*, quick: bool = False, seed: int = 0) -> Trunk:
    """ResNet-8 on CIFAR-10 (a quarter as wide, on the stand-in, when quick)."""
    recipe = Recipe(
        "resnet8-cifar10", 7, 128, 0.4, "sgd", 5e-4, moved=4, mirrored=True, label_smoothing=0.1,
        small=((4, 24),), channels_last=True, bf16=True, seed=seed,
    )  # fmt: skip
    if quick:
        recipe = Recipe("resnet8-cascade-quick", 3, 32, 0.2, "sgd", 5e-4, seed=seed, standin=True)
    return trunk(recipe, lambda: models.ResNet(1, width=4 if quick else 16), image_data("cifar10", quick))


def fashion_trunk(*, quick: bool = False, seed: int = 0) -> Trunk:
    """ResNet-8 on Fashion-MNIST (half as wide, on the stand-in, when quick)."""
    recipe = Recipe(
        "resnet8-fashion_mnist", 24, 128, 0.3, "sgd", 5e-4, moved=2, mirrored=True, label_smoothing=0.1,
        channels_last=True, seed=seed,
    )  # fmt: skip
    if quick:
        recipe = Recipe("resnet8-fashion_mnist-quick", 3, 32, 0.2, "sgd", 5e-4, seed=seed, standin=True)
    build = lambda: models.ResNet(1, width=8 if quick else 16, channels=1)  # noqa: E731
    return trunk(recipe, build, image_data("fashion_mnist", quick))


def tinyconv_trunk(*, quick: bool = False, seed: int = 0) -> Trunk:
    """A small network that reads CIFAR-10 at 16 x 16."""
    recipe = Recipe("tinyconv-cifar10", 8, 128, 4e-3, moved=4, mirrored=True, channels_last=True, bf16=True, seed=seed)
    if quick:
        recipe = Recipe("tinyconv-cifar10-quick", 6, 32, 4e-3, seed=seed, standin=True)
    build = lambda: models.Prepared(models.Resize(16), models.TinyConv(width=8 if quick else 24))  # noqa: E731
    return trunk(recipe, build, image_data("cifar10", quick))


def minilm_trunk(*, quick: bool = False, seed: int = 0) -> Trunk:
    """MiniLM-L6 fine-tuned on all training reviews of IMDB at length 128 (the tiny stand-in when quick)."""
    recipe = Recipe("minilm-imdb", 1, 32, 1e-4, bf16=True, seed=seed)
    if quick:
        recipe = Recipe("minilm-imdb-quick", 4, 32, 5e-3, seed=seed, rows=256, standin=True)

    return trunk(recipe, lambda: models.minilm_classifier(datasets.minilm(standin=quick), seed=seed), reviews(quick))


def charts_trunk(*, quick: bool = False, seed: int = 0) -> Trunk:
    """A convolutional network for control charts."""
    recipe = Recipe(f"charts{'-quick' * quick}", 4 if quick else 10, 32 if quick else 64, 4e-3, seed=seed)
    return trunk(recipe, models.ChartNet, generated.data(generated.control_charts, quick))


def code_trunk(layers: int = 4, *, quick: bool = False, seed: int = 0) -> Trunk:
    """A small BERT that tags the words of generated code."""
    recipe = Recipe(f"code{layers}", 8, 32, 3e-3, seed=seed, rows=8_000)
    if quick:
        recipe = Recipe(f"code{layers}-quick", 2, 16, 3e-3, seed=seed)
    draw = generated.data(generated.code, quick)

    def data(part: str, limit: int | None) -> tuple[Inputs, Tensor]:
        words, tags = draw(part, limit)
        return {"input_ids": words, "attention_mask": (tags != IGNORE).long()}, tags

    build = partial(models.code_tagger, layers, len(generated.VOCABULARY), len(generated.TAGS), generated.TOKENS)
    return trunk(recipe, build, data)


def thinker_trunk(task: str, steps: int = 6, *, quick: bool = False, seed: int = 0) -> Trunk:
    """A recurrent network that takes as many steps for every row of a task of Graves 2016."""
    recipe = Recipe(f"thinker-{task}-{steps}", 10, 256, 3e-3, weight_decay=1e-4, seed=seed, rows=300_000)
    if quick:
        recipe = replace(recipe, name=f"{recipe.name}-quick", epochs=2, rows=2_000, standin=True)
    draw = generated.TASKS[task]
    width, classes = draw(1)[0].shape[1], 10 if task == "addition" else 2
    data = generated.data(lambda rows, part: draw(rows, part)[:2], quick)
    return trunk(recipe, lambda: models.Thinker(width, classes, steps), data)


TRUNKS: dict[str, Callable[..., Trunk]] = {
    "lenet-mnist": lenet_trunk,
    "lenet-fashion": partial(lenet_trunk, "fashion_mnist"),
    "resnet20": resnet_trunk,
    "resnet8": resnet8_trunk,
    "resnet8-fashion": fashion_trunk,
    "tinyconv": tinyconv_trunk,
    "minilm": minilm_trunk,
    "charts": charts_trunk,
    "code": code_trunk,
    **{f"thinker-{task}": partial(thinker_trunk, task) for task in generated.TASKS},
}


def main() -> None:
    """Train the named trunks, or all, that are not kept yet and print what they reach."""
    parser = argparse.ArgumentParser(prog="python -m examples.trunks", description=main.__doc__)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(TRUNKS)}; all unless given")
    parser.add_argument("--quick", action="store_true", help="stand-in data, small models")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything that is random (0)")
    parser.add_argument("--threads", type=int, default=2, help="threads that torch may use (2)")
    parser.add_argument("--ship", action="store_true", help="also write weights and curve to examples/weights")
    options = parser.parse_args()
    unknown = [name for name in options.names if name not in TRUNKS]
    if unknown or options.threads < 1:
        parser.error(f"no trunk {unknown[0]!r}; there are {', '.join(TRUNKS)}" if unknown else "--threads is 1 or more")
    torch.set_num_threads(options.threads)
    for name in options.names or TRUNKS:
        got = TRUNKS[name](quick=options.quick, seed=options.seed)
        figures = f"test {got.accuracy:.4f}, validation {got.val_accuracy:.4f}, trained in {got.seconds:.0f} s"
        print(f"{got.recipe.name}: {figures}", flush=True)
        if options.ship:
            ship(got, f"python -m examples.trunks {name} --ship --seed {options.seed} --threads {options.threads}")


if __name__ == "__main__":
    try:
        main()
    except DatasetError as problem:
        sys.exit(f"error: {problem}")
