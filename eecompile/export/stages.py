"""One straight-line file for each stage, with the conditions on the host: for runtimes without conditions, or that pay for
both of their branches. Each stage can be quantized by the runtime's own tools on the rows that reach it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from eecompile.costs import CostModel
from eecompile.errors import ExportError
from eecompile.export.description import KEY, Description
from eecompile.ir.settings import EXITS, Settings
from eecompile.onnx import convert
from eecompile.passes.lower import Segment, state_shapes, states_of
from eecompile.passes.lower_cond import (
    Holder,
    Traced,
    Whole,
    example_of,
    free_axes,
    input_names,
    plan,
    refuse,
    signed,
    traced,
)
from eecompile.passes.partition import Partition
from eecompile.program import Program
from eecompile.training.batches import batches

PREDICTION, CONFIDENCE, SCORES = "stage_prediction", "stage_confidence", "scores"


@dataclass(frozen=True)
class Value:
    """A value between stages: its name, the axis of its rows, and its shape, in which a string is a dynamic size."""

    name: str
    batch_axis: int | None
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Step:
    """One stage.

    Attributes:
        takes: What it is called with.
        gives: Names of its outputs, in order.
        leaves: Indices of the output leaves among them, with their names there.
        live: What later stages read.
    """

    file: str
    exit: int | None
    module: nn.Module
    takes: tuple[Value, ...]
    gives: tuple[str, ...]
    leaves: tuple[tuple[int, str], ...]
    live: tuple[Value, ...]


class Stage(Holder):
    """A segment as straight-line code: every row that it is given, with the head at its end."""

    def __init__(self, program: Program, settings: Settings, segment: Segment, step: Mapping[str, Any]) -> None:
        super().__init__(segment.module, segment.head, settings=settings)
        self.segment, self.wanted = segment, program.prediction_leaf
        self.states, self.new = step["states"], step["new"]
        names = [v.name for v in step["takes"]]
        self.forward = signed(lambda given: self._run([given[n] for n in names]), names)

    def _run(self, given: list[Tensor]) -> tuple[Tensor, ...]:
        segment, tensors = self.segment, self.tensors()
        values = Traced(segment.module, tensors).run(*given)
        if segment.exit is None:
            sure, *leaves, scores = values
            axis = self.wanted.batch_axis
            return ((scores.movedim(axis, 0) if axis else scores).to(self.wanted.dtype), sure, *leaves)
        at = segment.decision
        rest = values[at + len(segment.leaves) :]
        handed, reads = rest[: len(segment.outputs)], rest[len(segment.outputs) :]
        sure = values[0] if segment.head is not None else values[1]
        scores = values[0] if segment.head is None else Traced(segment.head, tensors).run(*reads)[0]
        given_on = [handed[i] for i in self.new]
        return (
            scores.to(self.wanted.dtype),
            sure,
            *values[2 : 2 + self.states],
            *values[at : at + len(segment.leaves)],
            *given_on,
        )


def steps_of(program: Program, settings: Settings) -> list[Step]:
    """The stages of a program.

    Raises:
        ExportError: Something is chosen within a stage, or the program has no exported form at all.
    """
    refuse(program, settings)
    segments = plan(program, settings).segments
    for segment in segments:
        inside = [n for n, m in segment.module.named_modules() if isinstance(m, Partition)]
        if inside:
            raise ExportError(
                "a stage is straight-line code, and here rows part ways within one",
                where=inside[0],
                wanted="a program with exits alone",
                hint='targets "pt2", "onnx" and "openvino" have conditions inside; or close what chooses first',
            )
    own = dict(zip((leaf.node for leaf in segments[0].inputs), input_names(program), strict=True))
    names = dict(own)
    found = []
    held: tuple[Value, ...] = ()
    for k, segment in enumerate(segments):
        for leaf in segment.outputs:
            names.setdefault(leaf.node, f"value_{leaf.node}")
        before = [leaf.node for leaf in segment.inputs]
        new = [i for i, leaf in enumerate(segment.outputs) if leaf.node not in before]
        following = segments[k + 1].takes_states if k + 1 < len(segments) else 0
        states = _states(program, k, following)
        takes = (*(Value(names[v.node], v.batch_axis, v.shape) for v in segment.inputs), *held[: segment.takes_states])
        leaves = tuple((i, f"leaf_{i}") for i in segment.leaves)
        gives = (PREDICTION, CONFIDENCE, *(s.name for s in states), *(n for _, n in leaves))
        gives += tuple(names[segment.outputs[i].node] for i in new)
        module = Stage(program, settings, segment, {"states": following, "new": new, "takes": takes})
        live = (*(Value(names[v.node], v.batch_axis, v.shape) for v in segment.outputs), *states)
        found.append(Step(f"stage_{k}.onnx", segment.exit, module, takes, gives, leaves, live))
        held = states
    return found


def _states(program: Program, stage: int, count: int) -> tuple[Value, ...]:
    """What rows carry from one decision to the next."""
    shapes = state_shapes(program)
    return tuple(Value(f"{name}_{stage}", 0, shapes[name]) for name in states_of(program)[:count])


def write(program: Program, settings: Settings, description: Description, path: Path) -> None:
    """Writes a folder: the stages, `program.json`, and the driver as `run.py`."""
    path.mkdir()
    steps, example = steps_of(program, settings), example_of(program, program.signature.dynamic)
    inputs = dict(zip(input_names(program), example, strict=True))
    values = dict(inputs)
    outputs = description.outputs[:-2]
    for step in steps:
        given = {v.name: values[v.name] for v in step.takes}
        shapes = {v.name: v.shape for v in step.takes}
        _save(program, step.module, given, shapes, step.gives, path / step.file)
        with torch.no_grad():
            values |= dict(zip(step.gives, step.module(**given), strict=True))
    at = program.prediction.index or 0
    tail = None
    if program.prediction.tail is not None:
        names = [SCORES, *inputs]
        axis = program.signature.outputs[at].batch_axis or 0
        given = {SCORES: values[PREDICTION].movedim(0, axis)} | inputs
        leaves = program.signature.inputs
        shapes = {SCORES: program.signature.outputs[at].shape} | {n: x.shape for n, x in zip(inputs, leaves, strict=True)}
        gives = tuple(outputs[i] for i in program.prediction.tail.slots)
        _save(program, Whole(program.prediction.tail.module, settings, names), given, shapes, gives, path / "tail.onnx")
        tail = {"file": "tail.onnx", "takes": names, "gives": gives}
    costs = CostModel(program).at_exits(settings)
    data = {
        "inputs": [
            {"name": n, "dtype": str(x.dtype).removeprefix("torch."), "shape": x.shape, "batch_axis": x.batch_axis}
            for n, x in zip(description.inputs, program.signature.inputs, strict=True)
        ],
        "outputs": outputs,
        KEY: json.loads(description.to_json()),
        "prediction": outputs[at],
        "prediction_axis": program.signature.outputs[at].batch_axis or 0,
        "end": len(program.exits),
        "stateful": bool(states_of(program)),
        "files": [*(s.file for s in steps), *([] if tail is None else ["tail.onnx"])],
        "tail": tail,
        "stages": [_stage(program, settings, s, outputs, costs) for s in steps],
    }
    (path / "program.json").write_text(json.dumps(data, indent=1))
    shutil.copyfile(Path(__file__).with_name("driver.py"), path / "run.py")


def _stage(program: Program, settings: Settings, step: Step, outputs: Any, costs: Any) -> dict[str, Any]:
    k = step.exit
    return {
        "file": step.file,
        "exit": k,
        "exit_name": None if k is None else program.exits[k].name,
        "threshold": None if k is None else settings[EXITS][k],
        "cost": costs[len(program.exits) if k is None else k],
        "takes": [v.name for v in step.takes],
        "gives": step.gives,
        "leaves": [
            {"value": n, "output": outputs[i], "batch_axis": program.signature.outputs[i].batch_axis} for i, n in step.leaves
        ],
        "live": [asdict(v) for v in step.live],
    }


def _save(
    program: Program,
    module: nn.Module,
    given: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int | str, ...]],
    gives: tuple[str, ...],
    path: Path,
) -> None:
    free = {n: free_axes(shapes[n], program.signature.dynamic) for n in given}
    given = {n: t.contiguous() for n, t in given.items()}  # as a driver hands them over; torch.onnx fails at a view's guards
    exported: ExportedProgram = traced(module, given, free)
    convert(exported, path, tuple(given), gives, [shapes[n] for n in given])


def stage_inputs(program: Program, settings: Settings, loader: Iterable[Any]) -> dict[str, list[dict[str, Any]]]:
    """What each stage of the target "stages" is given, for a runtime's own static quantization.

    Args:
        loader: Yields batches as for `evaluate`; labels are not read.

    Returns:
        By file name, one entry for each batch of which rows reach the stage: arrays by the names of the stage's inputs.

    Raises:
        ExportError: The program has no such stages.
    """
    steps = steps_of(program, settings)
    found: dict[str, list[dict[str, Any]]] = {step.file: [] for step in steps}
    for batch in batches(loader):
        flat = program.signature.flatten(batch.args, batch.kwargs)
        values = dict(zip(input_names(program), flat, strict=True))
        for step in steps:
            given = {v.name: values[v.name] for v in step.takes}
            found[step.file].append({n: t.detach().cpu().numpy() for n, t in given.items()})
            if step.exit is None:
                break
            with torch.no_grad():
                values |= dict(zip(step.gives, step.module(**given), strict=True))
            stay = (~(values[CONFIDENCE] >= settings[EXITS][step.exit])).nonzero().squeeze(-1)
            if not len(stay):
                break
            lives = {v.name: v.batch_axis for v in step.live}
            values = {n: values[n] if a is None else values[n].index_select(a, stay) for n, a in lives.items()}
    return found
