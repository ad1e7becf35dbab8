"""`fast.save(path)`: both captures where training needs them, the heads, and one manifest."""

from __future__ import annotations

import copy
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from eecompile.artifact import files
from eecompile.capture.tensors import MODEL, ROOT
from eecompile.errors import ArtifactError
from eecompile.gates import describe as describe_unit
from eecompile.heads import Branch, as_data, describe
from eecompile.ir.records import Arm, Choice
from eecompile.passes import facts
from eecompile.plain import as_path
from eecompile.program import Exit

if TYPE_CHECKING:
    from eecompile.module import CompiledModule


def write(fast: CompiledModule, path: str | Path) -> None:
    """Saves a compiled module as a directory; an older program there stays whole until the new one is complete.

    Raises:
        ArtifactError: Something cannot be saved without a pickle, or the disk refuses.
        CaptureError: The user's model has changed since it was compiled.
    """
    fast.unchanged()
    program = fast.program
    if program.capture.front_end != "export":
        raise ArtifactError(
            'a program of capture="blocks" cannot be saved: it runs the Python model itself',
            hint="save the model's weights and compile again, or make the model exportable",
        )
    if fast.origin.exported is None:
        raise ArtifactError(
            "this program cannot be saved: the export that it was made from is not there",
            got="a compiled module that was put together from a graph",
            hint="compile the model with eecompile(...), which keeps it",
        )
    directory = files.free_place(as_path("path", path, ArtifactError))
    graphs = fast.training_graphs
    if fast.strategy.joint and fast.origin.capture_training is not None and graphs.exported is None:
        fast.capture_training()
    heads = {e.name: _head(fast.branch(e.name), e) for e in program.exits}
    manifest: dict[str, Any] = {
        "format": files.FORMAT,
        "version": files.VERSION,
        "torch": torch.__version__,
        "strategy": fast.strategy.to_dict(),
        "executor": fast.engine.asked,  # "auto" may mean another one where it is loaded
        "backend": fast.backend,
        "signature": program.signature.to_dict(),
        "train_signature": None if graphs.signature is None else graphs.signature.to_dict(),
        "prediction": program.prediction.index,
        "models": list(program.capture.models),
        "blocks": program.structure.block_pattern,
        "places": [asdict(p) for p in program.capture.places],
        "exits": [_exit(e) for e in program.exits],
        "heads": heads,
        "settings": fast.live.to_dict(),
        "choices": _choices(fast),
        "stages": [s.flops for s in program.stages],
        "task": fast.task,
        "guarantee": None if fast.guarantee is None else fast.guarantee.to_dict(),
        "notes": list(fast.notes),
        "autocast": sorted(str(d).removeprefix("torch.") for d in fast.entry.autocast.verified),
    }
    files.save(directory, manifest, partial(_put_all, fast, directory, heads))


def _put_all(fast: CompiledModule, directory: Path, heads: dict[str, Any], entries: dict[str, Any]) -> None:
    """Writes every file but the manifest; `entries` grows by one with each."""
    program = fast.program
    tensors = {
        name: t.detach().cpu().contiguous()
        for name, t in fast.heads.state_dict().items()
        if heads[name.split(".")[0]]["kind"] != "shared" or ".score." in name
    }
    tensors |= {f"gates.{name}": t.detach().cpu().contiguous() for name, t in fast.gate_units.state_dict().items()}
    tensors |= {f"combination.{n}": t.detach().cpu() for n, t in fast.combination.state_dict().items()}
    customs = {arm.module.rpartition(".")[2]: (c, arm) for c in program.choices for arm in c.arms if arm.custom}
    for name, t in fast.route_units.state_dict().items():
        if name.split(".")[0] not in customs:
            tensors[f"routes.{name}"] = t.detach().cpu().contiguous()
    weights = {name: t.clone() for name, t in tensors.items()}  # shared storage has no place in a safetensors file
    entries["heads"] = files.put(directory, "heads", ".safetensors", lambda p: save_file(weights, p))
    for mode, exported in (("eval", fast.origin.exported), ("train", fast.training_graphs.exported)):
        if exported is not None:
            entries[mode] = files.put(directory, mode, ".pt2", partial(_export, exported, program.source))
    for e in program.exits:
        if heads[e.name]["kind"] == "custom":
            branch = fast.branch(e.name)
            entries[f"head {e.name}"] = files.put(directory, f"head_{e.name}", ".pt2", partial(_custom, branch, fast))

    for choice, arm in customs.values():
        put = partial(_custom_branch, fast, choice, arm)
        entries[f"branch {arm.name}"] = files.put(directory, f"branch_{arm.name}", ".pt2", put)


def _choices(fast: CompiledModule) -> dict[str, Any]:
    """The records of what decides inside, and the units that give its scores, as JSON data."""
    router = getattr(fast.route_units, "unit", None)
    return {
        "records": fast.program.choices.to_dict(),
        "units": {name: describe_unit(unit) for name, unit in fast.gate_units.named_children()},
        "router": None if router is None else as_data(router),
    }


def _exit(e: Exit) -> dict[str, Any]:
    return {**asdict(e), "criterion": e.criterion.to_dict()}


def _head(branch: Branch, e: Exit) -> dict[str, Any]:
    if e.head_kind == "shared":
        return {"kind": "shared", "score": branch.score is not None}
    known = describe(branch)
    if known is not None:
        return known
    return {"kind": "custom", "takes_mask": branch.takes_mask, "score": branch.score is not None}


def _export(exported: ExportedProgram, source: fx.GraphModule, path: Path) -> None:
    """The exported program with the model's present weights, without example inputs: those are pickled."""
    program = copy.copy(exported)
    program._example_inputs = None
    now = dict(source.named_parameters(remove_duplicate=False)) | dict(source.named_buffers(remove_duplicate=False))
    state = {}
    for name, t in exported.state_dict.items():
        plain = name.removeprefix("m.")
        present = next((now[k] for k in (f"{ROOT}.{plain}", f"{MODEL}.{plain}", plain) if k in now), t)
        state[name] = _on_cpu(present)
    program._state_dict = state
    files.save_program(program, path)


def _on_cpu(t: Any) -> Any:
    if isinstance(t, nn.Parameter) and t.device.type != "cpu":
        return nn.Parameter(t.detach().cpu(), requires_grad=t.requires_grad)
    return t.cpu() if isinstance(t, Tensor) and t.device.type != "cpu" else t


def _custom(branch: Branch, fast: CompiledModule, path: Path) -> None:
    """A user's head: exported, since its class may not be there when the program is loaded."""
    e = next(e for e in fast.program.exits if fast.branch(e.name) is branch)
    node = next(n for n in fast.program.source.graph.nodes if n.name == e.node)
    live = next(v for c in fast.program.structure.cuts if c.after == e.after for v in c.live if v.node == e.node)
    _exported(branch.head, live.shape, live.batch_axis, node.meta["val"].dtype, "head", e.name, path)


def _custom_branch(fast: CompiledModule, choice: Choice, arm: Arm, path: Path) -> None:
    """A user's branch: exported as a user's head is."""
    node = next(n for n in fast.program.source.graph.nodes if n.name == choice.reads[0])
    batch = facts.Batch(fast.program.source, fast.program.signature)
    axis = batch.axis(node)
    branch = fast.graph_module.get_submodule(arm.module)
    _exported(branch, batch.sizes(node), axis, node.meta["val"].dtype, "branch", arm.name, path)


def _exported(module: nn.Module, sizes: Any, batch_axis: Any, dtype: torch.dtype, kind: str, where: str, path: Path) -> None:
    """Writes a module of the user's that takes one value.

    Raises:
        ArtifactError: torch.export cannot trace it.
    """
    shape = [3 if i == batch_axis else s if isinstance(s, int) else 8 for i, s in enumerate(sizes)]
    example = torch.zeros(shape, dtype=dtype)
    free = {i: torch.export.Dim.AUTO for i, s in enumerate(sizes) if isinstance(s, str)}
    try:
        exported = torch.export.export(copy.deepcopy(module).cpu().eval(), (example,), dynamic_shapes=(free,), strict=False)
    except Exception as error:  # torch.export raises many unrelated types
        raise ArtifactError(
            f"a custom {kind} cannot be exported, so the program cannot be saved",
            where=where,
            got=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            hint=f"use a {'built-in head' if kind == 'head' else 'light version'}, or one that torch.export can trace",
        ) from error
    exported._example_inputs = None
    files.save_program(exported, path)
