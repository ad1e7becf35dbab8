"""The checks of `doctor`. Each says what is there; what is broken does not stop the others."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import eecompile

PACKAGES = ("torch", "accelerate", "networkx", "numpy", "rich", "safetensors", "typer")
EXTRAS = {"scikit-learn": ("sklearn", "demo"), "transformers": ("transformers", "hf"), "pillow": ("PIL", "examples")}
OPERATORS = tuple(
    "confidence select gate choose halt blank ensemble keep_best weighted_ensemble decide open_rows tick".split()
)


@dataclass
class Check:
    """One line: `state` is "ok", "no" (not here, not needed) or "broken"."""

    name: str
    state: str
    detail: str


def run(self_test: bool) -> list[Check]:
    """All checks; those that need torch only where it can be imported."""
    found = [Check("python", "ok", f"{platform.python_version()} on {platform.platform()}")]
    found.append(Check("eecompile", "ok", f"{eecompile.__version__} in {Path(eecompile.__file__).parent}"))
    found += [package(name, name) for name in PACKAGES]
    found += [extra(name, *EXTRAS[name]) for name in EXTRAS]
    if any(c.name == "torch" and c.state == "broken" for c in found):
        return found
    tries: list[tuple[str, Callable[[], Iterator[Check]]]] = [
        ("devices", devices),
        ("triton", triton),
        ("compiler", compiler),
        ("operators", operators),
        ("executors", executors),
    ]
    if self_test:
        tries.append(("self-test", end_to_end))
    for name, check in tries:
        try:
            found += check()
        except Exception as error:  # noqa: BLE001  a broken installation fails in any way
            first = next(iter(str(error).splitlines()), "")
            found.append(Check(name, "broken", f"{type(error).__name__}: {first}"))
    return found


def package(name: str, module: str) -> Check:
    """A dependency: its version, or why it cannot be imported."""
    try:
        importlib.import_module(module)
        return Check(name, "ok", importlib.metadata.version(name))
    except Exception as error:  # noqa: BLE001  a broken package fails in any way
        return Check(name, "broken", f"{type(error).__name__}: {error}; pip install {name}")


def extra(name: str, module: str, extra_name: str) -> Check:
    """An optional package; found without importing it."""
    if importlib.util.find_spec(module) is None:
        return Check(name, "no", f"not installed and not needed to run; pip install 'eecompile[{extra_name}]'")
    return Check(name, "ok", importlib.metadata.version(name))


def devices() -> Iterator[Check]:
    """Threads, and CUDA devices or why there is none."""
    import torch

    yield Check("cpu", "ok", f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads")
    if torch.cuda.is_available():
        named = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        yield Check("cuda", "ok", f"{torch.version.cuda}: {named}")
    else:
        build = "this torch is a CPU build" if torch.version.cuda is None else "no device or no driver"
        yield Check("cuda", "no", f"{build}; everything runs on the CPU")


def triton() -> Iterator[Check]:
    """Whether kernels can run, and what runs in their place."""
    import torch

    from eecompile.kernels import _triton

    if not _triton.HAVE_TRITON:
        missing = "not installed" if sys.platform == "linux" else f"not made for {sys.platform}"
        yield Check("triton", "no", f"{missing}; the plain torch definitions run")
    elif torch.cuda.is_available():
        yield Check("triton", "ok", f"{importlib.metadata.version('triton')}, kernels run on the GPU")
    else:
        how = "kernels run in the interpreter" if _triton.INTERPRETED else "no GPU: the plain torch definitions run"
        yield Check("triton", "ok", f"{importlib.metadata.version('triton')}; {how}")


def compiler() -> Iterator[Check]:
    """What backend="inductor" needs on the CPU: a C++ compiler and Python's headers."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    path = next((p for p in map(shutil.which, names) if p), None)
    if path is None:
        yield Check("inductor", "no", f"no C++ compiler ({', '.join(names)}); backend='eager' works")
        return
    version = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout.split("\n")[0]
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not headers.is_file():
        yield Check("inductor", "no", f"{path} is there, but not {headers}; install Python's headers")
        return
    yield Check("inductor", "ok", f"{path} ({version})")


def operators() -> Iterator[Check]:
    """The vocabulary of the rewritten graph."""
    import torch

    importlib.import_module("eecompile.ops")  # registers them
    missing = [name for name in OPERATORS if not hasattr(torch.ops.eecompile, name)]
    if missing:
        yield Check("operators", "broken", f"not registered: {', '.join(missing)}")
    else:
        yield Check("operators", "ok", f"torch.ops.eecompile: {', '.join(OPERATORS)}")


def executors() -> Iterator[Check]:
    """Which executors run here."""
    import torch

    from eecompile.runtime.device.support import VERIFIED, support

    yield Check("executor reference", "ok", "computes everything and selects")
    yield Check("executor compact", "ok", "computes the survivors only")
    yield Check("executor simulate", "ok", "runs device programs on any machine, to check them")
    found = support(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    states = {"graph": "ok", "bound": "ok", "none": "no"}
    bound = "it launches by a bound on the survivors instead, and waits at each exit where there is a deadline"
    said = f"{found.reason}; {bound}" if found.way == "bound" else found.reason
    yield Check("executor device", states[found.way], said if VERIFIED else f"{said}; not verified on a GPU yet")


def end_to_end() -> Iterator[Check]:
    """A tiny model through every step, each checked for what it must give."""
    import torch

    from eecompile.cli.tiny import Tiny, TinyLoader

    state = torch.get_rng_state()
    torch.manual_seed(0)
    try:
        model, x, loader = Tiny().eval(), torch.randn(6, 3, 8, 8), TinyLoader()
        start = time.perf_counter()
        fast = eecompile.eecompile(model, "branchy", example_inputs=(x,))
        yield _step("rewrite", start, _rewritten(fast, model, x))
        steps: list[tuple[str, Callable[[], str]]] = [
            ("fit", lambda: _fitted(fast, loader)),
            ("calibrate", lambda: _calibrated(fast, loader)),
            ("executors agree", lambda: _agreed(fast, x)),
            ("save and load", lambda: _saved(fast, x)),
        ]
        for name, step in steps:
            start = time.perf_counter()
            yield _step(name, start, step())
    finally:
        torch.set_rng_state(state)


def _step(name: str, start: float, said: str) -> Check:
    state = "broken" if said.startswith("wrong") else "ok"
    return Check(f"self-test: {name}", state, f"{said} ({time.perf_counter() - start:.2f} s)")


def _rewritten(fast: Any, model: Any, x: Any) -> str:
    import torch

    fast.set_thresholds(2.0)
    with torch.no_grad():
        same = torch.equal(fast(x), model(x))
    return f"{len(fast.exits)} exits; closed, the model's own output" if same else "wrong: closed exits change the output"


def _fitted(fast: Any, loader: Any) -> str:
    report = fast.fit(loader, epochs=1, progress=False)
    return f"{report.steps} steps, loss {report.rows[-1].loss:.3g}"


def _calibrated(fast: Any, loader: Any) -> str:
    report = fast.calibrate(loader, max_drop=0.5, delta=None)
    return f"{report.rows} rows, expected cost {report.expected_cost:.0%}"


def _agreed(fast: Any, x: Any) -> str:
    import torch

    confidences = fast.observe(x).confidences[0]
    middle = float(confidences.sort().values[len(x) // 2])
    wanted = int((confidences >= middle).sum())  # a half of the rows, and those that are as sure as the last of them
    fast.set_thresholds([middle] + [2.0] * (len(fast.exits) - 1))
    results = []
    for name in ("reference", "compact", "simulate"):
        fast.executor = name
        with torch.no_grad():
            results.append(fast.run(x))
    first, *others = results
    if not all(torch.equal(first.exit_index, r.exit_index) for r in others):
        return "wrong: rows exit elsewhere"
    if not all(torch.allclose(first.output, r.output, atol=1e-5) for r in others):
        return "wrong: outputs differ"
    leaving = int((first.exit_index < len(fast.exits)).sum())
    if leaving != wanted:
        return f"wrong: {leaving} of {len(x)} rows exited early, by the thresholds {wanted} do"
    return f"the same output and exits, {leaving} of {len(x)} rows exited early"


def _saved(fast: Any, x: Any) -> str:
    import torch

    with tempfile.TemporaryDirectory() as place:
        fast.save(place)
        again = eecompile.load(place)
        with torch.no_grad():
            same = torch.equal(again(x), fast(x))
    return "loaded and equal" if same else "wrong: the loaded program gives another output"
