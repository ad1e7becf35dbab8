"""Which line of the user's model stopped the capture."""

from __future__ import annotations

import inspect
import keyword
import os
import re
import traceback
from typing import Any

import sympy
import torch
from torch import fx, nn
from torch.export import ExportedProgram

from eecompile.errors import CaptureError

_OURS = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_TORCH = os.path.dirname(os.path.abspath(torch.__file__))


def _files(model: nn.Module) -> set[str]:
    files = set()
    for m in model.modules():
        try:
            files.add(os.path.abspath(inspect.getfile(type(m))))
        except (TypeError, OSError):  # built-in or made in an interactive session
            continue
    return {f for f in files if not f.startswith(_TORCH)}


def line_here(model: nn.Module) -> str | None:
    """`file:line in function: code` of the innermost frame of the model that is running now."""
    files = _files(model)
    for frame in reversed(traceback.extract_stack()):
        if os.path.abspath(frame.filename) in files:
            return f"{frame.filename}:{frame.lineno} in {frame.name}: {frame.line}"
    return None


def line_of(model: nn.Module, error: BaseException) -> str | None:
    """`file:line in function: code` of the innermost frame that belongs to the model."""
    files = _files(model)
    seen: list[str] = []
    link: BaseException | None = error
    while link is not None:
        for frame in traceback.extract_tb(link.__traceback__):
            path = os.path.abspath(frame.filename)
            inside = path in files or (
                not path.startswith((_OURS, _TORCH)) and "site-packages" not in path and frame.name == "forward"
            )
            if inside:
                seen.append(f"{frame.filename}:{frame.lineno} in {frame.name}: {frame.line}")
        link = link.__cause__ or link.__context__
    if seen:
        return seen[-1]
    guarded = _guard_line(error, files)
    if guarded is not None:
        return guarded
    # torch.export also writes the user's stack into the message
    for match in reversed(re.findall(r'File "([^"]+)", line (\d+), in (\w+)', str(error))):
        if os.path.abspath(match[0]) in files:
            return f"{match[0]}:{match[1]} in {match[2]}"
    return None


def _guard_line(error: BaseException, files: set[str]) -> str | None:
    """The line that branched on a size, where that is what failed: torch checks sizes when the trace is done, and keeps
    the place of each branch in the tracer's environment.
    """
    trace = error.__traceback__
    while trace is not None:
        tracer = trace.tb_frame.f_locals.get("fake_mode")
        for guard in getattr(getattr(tracer, "shape_env", None), "guards", ()):
            place = getattr(getattr(guard, "sloc", None), "framework_loc", None)
            if isinstance(place, traceback.FrameSummary) and os.path.abspath(place.filename) in files:
                return f"{place.filename}:{place.lineno} in {place.name}: {place.line}"
        trace = trace.tb_next
    return None


def guard_lines(exported: ExportedProgram) -> list[str]:
    """`net.py:12 in forward: if x.shape[1] > 4:` for each guard of a trace, empty where torch branched by itself.

    Nothing at all where the trace is gone (a program from a file), or does not have a line for each guard.
    """
    guards = _trace_guards(exported)
    if len(guards) != len(exported._guards_code):
        return [""] * len(exported._guards_code)
    return [_line(g) for g in guards]


def size_line(exported: ExportedProgram, size: int) -> str | None:
    """The line that fixed a dynamic size at this number."""
    for guard in _trace_guards(exported):
        if isinstance(guard.expr, sympy.Eq) and size in guard.expr.args and (line := _line(guard)):
            return line
    return None


def _trace_guards(exported: ExportedProgram) -> list[Any]:
    for node in exported.graph.nodes:
        env = getattr(getattr(node.meta.get("val"), "fake_mode", None), "shape_env", None)
        if env is not None:
            return list(env.guards)
    return []


def _line(guard: Any) -> str:
    place = getattr(guard.sloc, "framework_loc", None)
    if not isinstance(place, traceback.FrameSummary) or os.path.abspath(place.filename).startswith((_OURS, _TORCH)):
        return ""
    return f"{os.path.basename(place.filename)}:{place.lineno} in {place.name}: {place.line}"


def _reason(error: BaseException) -> str:
    """The first sentence of torch's message, and the one after it where that says which constraint failed."""
    lines = [x.strip() for x in str(error).splitlines() if x.strip()]
    first = lines[0].partition(" For more information")[0] if lines else ""
    if len(lines) > 1 and lines[1].startswith("- "):
        first += " " + lines[1].removeprefix("- ").partition(". ")[0].rstrip(".")
    return f"{type(error).__name__}: {first[:300]}" if first else type(error).__name__


def model_failed(model: nn.Module, error: BaseException, example: str) -> CaptureError:
    """The error for a model that does not run on its example, traced or not."""
    return CaptureError(
        f"{type(model).__name__} itself fails on the example",
        where=line_of(model, error) or type(model).__name__,
        got=f"{_reason(error)} (example {example})",
        hint="give an example that the model runs on",
    )


def capture_failed(model: nn.Module, error: BaseException, attempts: list[str]) -> CaptureError:
    """The error for a model that cannot be exported."""
    foreign = re.search(r"Found <class '([\w.]+)'> in output", str(error))
    if foreign is not None:
        cache = foreign[1].endswith("Cache")
        return CaptureError(
            f"{type(model).__name__} returns an object that torch cannot take apart",
            where=type(model).__name__,
            got=foreign[1],
            wanted="tensors in tuples, lists, dicts, named tuples, or output classes of transformers",
            hint='pass use_cache=False: example_kwargs={..., "use_cache": False}'
            if cache
            else "register its class with torch.export.register_dataclass, or return a dict",
        )
    words = [p for p, _ in model.named_modules() if any(map(keyword.iskeyword, p.split(".")))]
    if words and isinstance(error, SyntaxError):
        return CaptureError(
            "a module is named like a keyword of Python, which torch.export cannot write into its code",
            where=", ".join(words[:5]),
            got=_reason(error),
            wanted="names such as class_ and from_",
            hint='rename it, or use capture="blocks"',
        )
    for path, m in model.named_modules():
        kind = "TorchScript" if isinstance(m, torch.jit.ScriptModule) else "quantized"
        if kind == "TorchScript" or ".quantized." in type(m).__module__:
            return CaptureError(
                f"{type(model).__name__} holds {kind} modules, which torch.export cannot trace",
                where=path or type(model).__name__,
                got=f"{type(m).__module__}.{type(m).__name__}; {_reason(error)}",
                wanted="Python modules with floating-point weights",
                hint='compile the model as it was before it was scripted or quantized, or use capture="blocks"',
            )
    line = line_of(model, error)
    return CaptureError(
        f"{type(model).__name__} could not be captured as one graph",
        where=line or type(model).__name__,
        got=_reason(error) + (f" (tried {'; '.join(attempts)})" if len(attempts) > 1 else ""),
        wanted="a forward whose Python control flow does not depend on data or on the number of rows",
        hint='use capture="blocks" (exits at module boundaries, no trace), or rewrite '
        + ("that line" if line else "what depends on them"),
    )


def strip(name: str, prefix: str) -> str:
    """`m.bert.weight` as `bert.weight`: the adapter is no part of the model."""
    if not prefix:
        return name
    return "" if name == prefix else name.removeprefix(prefix + ".")


def stack_of(node: fx.Node, prefix: str) -> tuple[tuple[str, int, str], ...]:
    """Modules around a node, outermost first: (path, number of the call, class name).

    A shared module that is called again carries `@k`; the path is the one of its first name.
    """
    out = []
    for key, (path, cls) in (node.meta.get("nn_module_stack") or {}).items():
        found = re.search(r"@(\d+)$", key) or re.search(r"@(\d+)$", path)
        plain = strip(re.sub(r"@\d+$", "", path), prefix)
        if not plain or plain.startswith("_empty"):
            continue
        kind = cls if isinstance(cls, str) else getattr(cls, "__qualname__", str(cls))
        out.append((plain, int(found.group(1)) if found else 0, kind.rsplit(".", 1)[-1]))
    return tuple(out)
