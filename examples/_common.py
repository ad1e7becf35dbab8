"""What the examples share: the command line, keeping what was trained, judging, timing, the record in JSON.

An example is one function; all that takes long is kept, so a second run only evaluates and measures:

    def example(options: Options, record: Record) -> None:
        trunk = resnet_trunk(quick=options.quick, seed=options.seed)            # examples/trunks.py, kept
        fast = eecompile(trunk.model, Branchy(...), example_inputs=(x,))
        fitted(fast, train, "branchy-resnet", options, trunk, epochs=4)         # kept, resumes; sets the weights
        record.done("train")                                                    # ends here with --until train
        seen = observed(fast, {"val": val, "test": test})                       # one pass each, kept
        variants = evaluated(fast, seen, record, "CIFAR-10", trunk.accuracy)       # calibrates on val, evaluates on test
        record.done("evaluate")
        timed(record, trunk.model, rows_of(test, 4), variants, (1, 32, 256))    # interleaved with the original

    if __name__ == "__main__":
        main("branchy_resnet", __doc__, example)

`main` parses ``--quick --seed --threads --out --until --json``, turns errors into one line and exit code 2,
prints the record and writes ``results/NAME.json`` (``NAME-quick.json``). What is trained lies in
``$EECOMPILE_RUNS``, data in ``$EECOMPILE_DATA`` (below ``~/.cache/eecompile`` unless set).

A program without exits to calibrate (gates, halting, routes) adds its own line with ``record.row(...)`` and gives
``timed`` its own ``Variant``: a name and a call. Every line of a record gets into the README's table
(``python -m examples.table``).
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from eecompile.benchmark import as_call, interleaved, summary
from eecompile.export.runtimes import opened
from eecompile.training.head_choice import with_kinds
from eecompile.training.head_report import HeadRow
from examples._constant import alternatives, by_exit
from examples._observed import Observed, observe
from examples._record import Options, Record, main, parse, write_result
from examples._registry import DatasetError, atomic
from examples.trunks import (
    Inputs,
    Recipe,
    Trunk,
    accuracy,
    console,
    fit_trunk,
    image_data,
    lenet_trunk,
    minilm_trunk,
    resnet_trunk,
    runs_root,
    take,
    trunk,
)

# ---- what is kept


def digest(settings: Mapping[str, Any]) -> str:
    """Eight letters that name a set of settings; functions count by their names."""
    text = json.dumps(settings, sort_keys=True, default=lambda v: getattr(v, "__qualname__", str(v)))
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def fitted(
    fast: Any,
    loader: DataLoader[Any],
    name: str,
    options: Options,
    trunk: Trunk,
    /,
    *,
    heads: Mapping[str, Any] | None = None,
    bf16: bool = False,
    **fit: Any,
) -> dict[str, Any]:
    """``fast.fit(loader, **fit)``, kept: weights are set on ``fast`` either way; gives the record of the training.

    Found again by name, strategy, trunk, options and size of the data. Training that was stopped goes on from its
    last checkpoint.

    Args:
        trunk: Of ``fast``; its weights change where ``fit`` or the strategy trains the trunk.
        heads: Options of a ``fit`` that comes first: of the heads alone, to convergence on what the frozen trunk gives.
            Without ``fit`` it is all.
        bf16: Mixed precision, where the processor has units for it.
        fit: Options of `eecompile.training.fit.fit`. ``seed`` is that of ``options`` unless given.
    """
    defaults = type(fast.strategy)().to_dict()
    chosen = {key: value for key, value in fast.strategy.to_dict().items() if key == "name" or value != defaults[key]}
    settings = {"name": name, "strategy": chosen, "trunk": asdict(trunk.recipe), "heads": heads, "bf16": bf16, **fit}
    settings["seed"] = options.seed
    settings["data"] = [rows_in(loader), loader.batch_size, loader.collate_fn.__qualname__]
    settings["exits"] = [[record.cut, record.head_kind] for record in fast.exits]
    path = runs_root() / f"{name}-{digest(settings)}.safetensors"
    fast.kept_as = path  # observations are kept next to it
    found = _kept(path, fast)
    if found is not None:
        return found
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoints = path.with_suffix(".checkpoints")
    options_of_fit: dict[str, Any] = {"checkpoint_every": 50, "checkpoint_dir": checkpoints, **fit}
    options_of_fit["train_in_place"] = True  # the weights that are kept, and that a second program starts from
    if bf16 and any(torch.cpu.get_capabilities().get(unit) for unit in ("amx_bf16", "avx512_bf16")):
        from accelerate import Accelerator

        # Before any other fit: accelerate takes one precision for all of a process.
        options_of_fit["accelerator"] = Accelerator(mixed_precision="bf16", cpu=True)

    def say(event: Any) -> None:
        if event.kind == "epoch":
            scores = ", ".join(f"{score:.3f}" for score in event.row.val_scores or event.row.scores or [])
            console.print(
                f"{name}: {event.stage} epoch {event.epoch}, loss {event.loss:.4f}, right {scores}", soft_wrap=True
            )

    always = {"seed": options.seed, "progress": console.is_terminal, "callbacks": (say,)}
    report: dict[str, Any] = {"settings": json.loads(json.dumps(settings, default=str)), "heads": [], "rows": []}
    calls = [{"trunk": False, "cached": True, **heads}] if heads is not None else []
    for call in (*calls, *([options_of_fit] if fit or not calls else [])):
        done = fast.fit(loader, **call, **always).to_dict()
        report = {**report, "heads": report["heads"] or done["heads"], "rows": report["rows"] + done["rows"]}
    report["seconds"] = round(sum(row["seconds"] for row in report["rows"]), 1)
    with atomic(path) as written:
        tensors = {key: value.detach().clone().contiguous() for key, value in _state(fast).items()}
        save_file(tensors, written, {"fit": json.dumps(report)})
    shutil.rmtree(checkpoints, ignore_errors=True)
    return report


def as_trained(fast: Any, name: str, *trunks: Trunk) -> None:
    """For a program that needs no `fitted`: what `observed` keeps is found by the strategy and the trunks."""
    settings = {"strategy": fast.strategy.to_dict(), "trunks": [asdict(trunk.recipe) for trunk in trunks]}
    fast.kept_as = runs_root() / f"{name}-{digest(settings)}.safetensors"


def _state(fast: Any) -> dict[str, Tensor]:
    """What training may change: all tensors but thresholds and temperatures."""
    fixed = {id(fast.thresholds), id(fast.temperatures)}
    return {key: value for key, value in fast.state_dict(keep_vars=True).items() if id(value) not in fixed}


def _kept(path: Path, fast: Any) -> dict[str, Any] | None:
    """Sets heads and tensors kept at ``path`` and gives the record next to them; None where nothing is kept."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file, torch.no_grad():
            found: dict[str, Any] = json.loads(file.metadata()["fit"])
            with_kinds(fast, [HeadRow(**row) for row in found["heads"]])
            for key, value in _state(fast).items():
                value.copy_(file.get_tensor(key))
        fast.train().eval()  # thresholds that waited for training hold, as after `fit`
    except (SafetensorError, RuntimeError, KeyError, TypeError) as error:
        raise DatasetError(f"{path} does not hold these weights ({error}). Delete it and run again.") from error
    return found


def observed(fast: Any, loaders: Mapping[str, DataLoader[Any]]) -> dict[str, Observed]:
    """Every exit's output on every row of each loader: one pass, kept next to the weights of `fitted`.

    Thresholds are then chosen and evaluated from it in seconds, however often; the test part is run once.
    """
    found = {}
    for part, loader in loaders.items():
        path = fast.kept_as.with_suffix(f".{part}-{rows_in(loader)}.safetensors")
        found[part] = observe(fast, loader, path)
    return found


# ---- judging


@dataclass(frozen=True)
class Variant:
    """Something to time against the original: its row, and a call on one batch.

    Attributes:
        row: Where ``speedup`` and ``seconds`` go.
        call: Runs a batch as arguments, ``call(*args, **kwargs)``.
        before: Called before every run over the batches, outside of no clock: to set thresholds.
    """

    row: dict[str, Any]
    call: Callable[..., Any]
    before: Callable[[], Any] = lambda: None


PROMISES: dict[str, dict[str, Any]] = {
    "guaranteed": {"max_drop": 0.01, "delta": 0.05},  # at most 1% lost, with 95% confidence
    "empirical": {"max_drop": 0.01, "delta": None},  # at most 1% lost on the validation part
}

CURVE = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99, 0.995, 0.998, 0.999, 1.0)  # thresholds of a plot


def evaluated(
    fast: Any,
    seen: Mapping[str, Observed],
    record: Record,
    label: str,
    original_accuracy: float,
    promises: Mapping[str, Mapping[str, Any]] = PROMISES,
) -> list[Variant]:
    """Calibrates on ``seen["val"]`` with each promise and evaluates on ``seen["test"]``: a row and a variant each."""
    variants = []
    for promise, options in promises.items():
        report = seen["val"].of(fast).calibrate(**options)
        able = not any(e.criterion.stateful for e in fast.exits)
        judgement = seen["test"].of(fast).evaluate(curve=CURVE if able else False)
        thresholds, temperatures = fast.thresholds.tolist(), fast.temperatures.tolist()
        row = record.row(
            label,
            thresholds=promise,
            original_accuracy=original_accuracy,
            full_accuracy=judgement.full_accuracy,
            accuracy=judgement.accuracy,
            cost=judgement.mean_cost,
            share={r.name: r.share for r in judgement.rows if r.open},
            guarantee=report.guarantee,
            **alternatives(by_exit(fast, [float(r.accuracy_if_all or 0.0) for r in judgement.rows]), judgement.mean_cost),
            exits=[{"name": e.name, "after": e.cut, "head": e.head_kind, "head_cost": e.head_cost} for e in fast.exits],
            calibration=report.to_dict(),
            evaluation=judgement.to_dict(),
        )

        def before(thresholds: list[float] = thresholds, temperatures: list[float] = temperatures) -> None:
            fast.set_thresholds(thresholds)
            fast.set_temperatures(temperatures)

        variants.append(Variant(row, fast, before))
    return variants


# ---- timing


def timed(
    record: Record,
    original: nn.Module | Callable[..., Any],
    inputs: Inputs,
    variants: Sequence[Variant],
    sizes: Sequence[int] = (1, 32),
    rows: Mapping[int, int] | None = None,
    rounds: int = 9,
) -> None:
    """Time of each variant against the original on the same rows of ``inputs``, in turn, in one run.

    Fills ``speedup`` (original's median time over the variant's) and ``seconds`` per row of ``inputs``, by batch size.

    Args:
        original: The model, or any callable like it.
        inputs: A tensor [N, ...] or a dictionary of them: rows like those in use, not picked.
        rows: How many of them for each size; 64 batches of 1, 8 of 32, 2 of 256 unless given.
    """
    quick = record.options.quick
    rounds = 3 if quick else rounds
    for size in sizes:
        count = min(len(next(iter(inputs.values()))) if isinstance(inputs, dict) else len(inputs),
                    (rows or {}).get(size, {1: 64, 32: 256, 256: 512}.get(size, 4 * size)))  # fmt: skip
        if quick:
            count = min(count, 2 * size)
        index = [torch.arange(at, min(at + size, count)) for at in range(0, count, size)]
        batches = [as_call(take(inputs, i)) for i in index]
        calls = {"original": _over(original, batches, lambda: None)}
        calls |= {str(i): _over(v.call, batches, v.before) for i, v in enumerate(variants)}
        was_training = getattr(original, "training", False)
        if isinstance(original, nn.Module):
            original.eval()
        with torch.no_grad():
            times = interleaved(calls, rounds, warm_up=1)
        if isinstance(original, nn.Module):
            original.train(was_training)
        base, base_spread = summary(times["original"])
        for i, v in enumerate(variants):
            median, spread = summary(times[str(i)])
            v.row.setdefault("speedup", {})[str(size)] = round(base / median, 3)
            v.row.setdefault("seconds", {})[str(size)] = {
                "original": base / count, "original_spread": base_spread / count,
                "early_exit": median / count, "early_exit_spread": spread / count,
                "rows": count, "rounds": rounds,
            }  # fmt: skip


def timed_as_onnx(
    record: Record,
    inputs: Tensor,
    variants: Sequence[Variant],
    sizes: Sequence[int],
    rows: Mapping[int, int] | None = None,
) -> None:
    """As `timed`, of programs with exits and of their model written as ONNX files, in ONNX Runtime.

    Fills ``onnx`` of each row with a ``speedup`` and ``seconds`` of its own.
    """
    with tempfile.TemporaryDirectory() as folder:

        def written(fast: Any, name: str) -> Callable[..., Any]:
            path = Path(folder, f"{name}.onnx")
            fast.export(path, target="onnx")
            program = opened(path)
            return lambda x: program.call((x,))

        first = variants[0].call
        first.settings = first.settings.neutral()
        original = written(first, "original")
        made = []
        for k, v in enumerate(variants):
            v.before()
            made.append(Variant(v.row.setdefault("onnx", {}), written(v.call, str(k))))
        timed(record, original, inputs, made, sizes, rows)


def _over(call: Callable[..., Any], batches: Sequence[Any], before: Callable[[], Any]) -> Callable[[], None]:
    def run() -> None:
        before()
        for args, kwargs in batches:
            call(*args, **kwargs)

    return run


def rows_in(loader: Any) -> int:
    """Rows of a torch ``DataLoader``."""
    return len(loader.dataset)


def rows_of(loader: Iterable[Any], batches: int) -> Inputs:
    """The inputs of the first batches of a loader, joined: what `timed` takes."""
    taken = list(islice(loader, batches))
    if isinstance(taken[0], Mapping):
        return {key: torch.cat([item[key] for item in taken]) for key in taken[0] if key != "labels"}
    return torch.cat([item[0] for item in taken])


__all__ = [
    "PROMISES",
    "DatasetError",
    "Inputs",
    "Observed",
    "Options",
    "Recipe",
    "Record",
    "Trunk",
    "Variant",
    "accuracy",
    "alternatives",
    "as_trained",
    "by_exit",
    "console",
    "evaluated",
    "fit_trunk",
    "fitted",
    "image_data",
    "lenet_trunk",
    "main",
    "minilm_trunk",
    "observed",
    "parse",
    "resnet_trunk",
    "rows_in",
    "rows_of",
    "runs_root",
    "take",
    "timed",
    "timed_as_onnx",
    "trunk",
    "write_result",
]  # fmt: skip
