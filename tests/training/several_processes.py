"""What one of several processes measures and trains, as JSON: `python several_processes.py FOLDER`, started by a launcher.

`measured` in a single process says what that has on the same rows.
"""

from __future__ import annotations

import copy
import json
import os
import sys
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from eecompile import EecompileError, eecompile, strategies
from eecompile.training.workers import processes

ROWS, BATCH = 75, 16  # five batches, the last one shorter: unequal shares


def model() -> nn.Module:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(3)]
    return nn.Sequential(*blocks, nn.Linear(8, 3)).eval()


def data() -> TensorDataset:
    x = torch.randn(ROWS, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y = model()(x).argmax(1)
    y[::9] = (y[::9] + 1) % 3
    return TensorDataset(x, y)


@cache
def program() -> Any:
    return eecompile(model(), strategies.Branchy(exits=2, head="linear"), example_inputs=(torch.randn(4, 8),))


def compiled() -> Any:
    return copy.deepcopy(program())


def loaders() -> dict[str, Iterable[Any]]:
    """The same rows, as users hand them over."""
    plain = DataLoader(data(), BATCH)
    found: dict[str, Iterable[Any]] = {"loader": plain, "list": list(plain)}
    if processes()[0] > 1:
        found["prepared"] = Accelerator(device_placement=False).prepare_data_loader(DataLoader(data(), BATCH))
        found["sampler"] = DataLoader(data(), BATCH, sampler=DistributedSampler(data()))
    return found


def said(report: Any) -> Any:
    """Without what is a time."""
    found = report.to_dict()
    for row in [found, *found.get("rows", [])] if isinstance(found.get("rows"), list) else [found]:
        row.pop("seconds", None)
    return json.loads(json.dumps(found))


def error_of(do: Callable[[], Any]) -> str:
    try:
        do()
    except EecompileError as error:
        return str(error)
    return "no error"


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(3))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def gated() -> Any:
    """Calibrated in turns: gates first, then exits."""
    strategy = strategies.SkipNet(open_bias=0.5) + strategies.Branchy(exits=1, head="linear")
    return eecompile(Residual().eval(), strategy, example_inputs=(torch.randn(4, 8),))


def measured(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    options = {"max_drop": 0.3, "delta": 0.2}
    for name, loader in loaders().items():
        fast = compiled()
        fast.set_thresholds(0.4)
        found[f"evaluate {name}"] = said(fast.evaluate(loader, curve=3))
        found[f"calibrate {name}"] = said(fast.calibrate(loader, groups="classes", **options))
        found[f"thresholds {name}"] = fast.thresholds.tolist()
    fast = gated()
    plain = list(DataLoader(data(), 8))
    found["calibrate gates"] = said(fast.calibrate(plain, target="agreement", **options))
    found["groups"] = said(compiled().evaluate(plain, groups=[k % 2 for k in range(ROWS)]))["by_group"]
    fast = compiled()
    fast.set_thresholds(0.4)
    path = fast.report(folder / f"report-{processes()[0]}.html", DataLoader(data(), BATCH))
    found["report"] = path.stat().st_size > 10_000
    return found


def trained() -> dict[str, Any]:
    fast = compiled()
    report = fast.fit(DataLoader(data(), 8, shuffle=True), epochs=2, lr=0.05, val_loader=DataLoader(data(), BATCH))
    return {"fit": said(report), "weights": {n: p.double().sum().item() for n, p in fast.named_parameters()}}


def failed(rank: int) -> dict[str, str]:
    def metric(prediction: Tensor, labels: Tensor) -> Tensor:
        if rank == 1:
            raise ValueError("no figures today")
        return prediction.argmax(1) == labels

    def other_order() -> DataLoader[Any]:
        return DataLoader(data(), BATCH, shuffle=True, generator=torch.Generator().manual_seed(rank))

    fast = compiled()
    fast.set_thresholds(0.4)
    batches = list(DataLoader(data(), BATCH))
    errors = {
        "another order": lambda: fast.calibrate(other_order(), max_drop=0.3, delta=0.2),
        "fewer batches": lambda: fast.evaluate(batches[: 5 - rank]),
        "labels": lambda: fast.evaluate([*batches[:3], batches[3][0]]),
        "one fails": lambda: fast.evaluate(batches, metric=metric),
        "unwritable": lambda: fast.report("/proc/report.html", batches),
    }
    found = {}
    for name, do in errors.items():
        try:
            found[name] = error_of(do)
        except ValueError as error:
            found[name] = f"ValueError: {error}"
    return found


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    count, rank = processes()
    found = measured(folder) | {"trained": trained(), "failed": failed(rank)}
    (folder / f"{rank} of {count}.json").write_text(json.dumps(found))
    assert count == int(os.environ.get("WORLD_SIZE", "1"))
    if torch.distributed.is_initialized():  # its threads must not be left to the end of the interpreter
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
