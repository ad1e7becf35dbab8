"""Runs a program that was exported in stages, with NumPy and ONNX Runtime alone: the conditions stand here, on the host.

`export` puts a copy of this file next to the stages. `python run.py INPUTS.npz OUTPUTS.npz` runs one batch; in a program:

    outputs = Program("folder")({"x": x})

A stage takes the rows that are left. What it gives lies under names in a pool of values; after its decision the rows that
stay are taken out of every value that a later stage reads. Other runtimes need the same loop and nothing else.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime


class Program:
    """A folder with `program.json` and its stages.

    Attributes:
        thresholds: By exit; to be set at any time, 0 or more, and above 1 nothing leaves there.
        rows: Of the last call, how many rows each stage was given.
    """

    def __init__(self, folder: Any, threads: int = 0) -> None:
        path = Path(folder)
        self.data = json.loads((path / "program.json").read_text())
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads
        self.sessions = {
            name: onnxruntime.InferenceSession(str(path / name), options, providers=["CPUExecutionProvider"])
            for name in self.data["files"]
        }
        self.thresholds = {s["exit_name"]: s["threshold"] for s in self.data["stages"] if s["exit"] is not None}
        self.rows: list[int] = []

    def __call__(self, inputs: Mapping[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
        """The model's outputs by name, `exit_index` [B] int64 and `confidence` [B] float32."""
        self._check(inputs)
        values = dict(inputs)
        first = next(i for i in self.data["inputs"] if i["batch_axis"] is not None)
        size = inputs[first["name"]].shape[first["batch_axis"]]
        rows = np.arange(size)
        index, sure = np.zeros(size, np.int64), np.zeros(size, np.float32)
        outputs: dict[str, np.ndarray[Any, Any]] = {}
        self.rows = []
        for stage in self.data["stages"]:
            self.rows.append(len(rows))
            given = self.sessions[stage["file"]].run(None, {n: values[n] for n in stage["takes"]})
            values |= dict(zip(stage["gives"], given, strict=True))
            confidence = values.pop("stage_confidence")
            leave = np.ones(len(rows), bool)
            if stage["exit"] is not None:
                leave = confidence >= np.float32(self.thresholds[stage["exit_name"]])
            self._write(outputs, self.data["prediction"], values.pop("stage_prediction")[leave], 0, rows[leave], size)
            index[rows[leave]] = self.data["end"] if stage["exit"] is None else stage["exit"]
            sure[rows[leave]] = np.nan_to_num(confidence[leave], nan=0.0)
            for leaf in stage["leaves"]:
                self._write(outputs, leaf["output"], values.pop(leaf["value"]), leaf["batch_axis"], rows, size)
            stay = np.flatnonzero(~leave)
            if len(stay) == 0:
                break
            if len(stay) < len(rows):
                lives = {v["name"]: v["batch_axis"] for v in stage["live"]}
                values = {n: values[n] if a is None else values[n].take(stay, a) for n, a in lives.items()}
                rows = rows[stay]
        outputs[self.data["prediction"]] = np.moveaxis(outputs[self.data["prediction"]], 0, self.data["prediction_axis"])
        return self._finish(inputs, outputs) | {"exit_index": index, "confidence": sure}

    def _check(self, inputs: Mapping[str, Any]) -> None:
        for i in self.data["inputs"]:
            got = inputs.get(i["name"])
            if got is None or got.ndim != len(i["shape"]) or str(got.dtype) != i["dtype"]:
                found = "nothing" if got is None else f"{got.dtype} {list(got.shape)}"
                raise ValueError(f"input {i['name']}: got {found}, wanted {i['dtype']} {i['shape']}")
        exits = {s["exit_name"] for s in self.data["stages"] if s["exit"] is not None}
        if set(self.thresholds) != exits:
            raise ValueError(f"thresholds: got {self.thresholds}, wanted one number for each of {sorted(exits)}")
        if self.data["stateful"] and max(self.thresholds.values(), default=0) > 1:
            raise ValueError(
                "an exit that counts towards later ones is closed by exporting again, not by a threshold above 1"
            )

    def _write(self, outputs: Any, name: str, value: Any, axis: int | None, rows: Any, size: int) -> None:
        if axis is None:
            outputs[name] = value
            return
        if name not in outputs:
            shape = (*value.shape[:axis], size, *value.shape[axis + 1 :])
            outputs[name] = np.full(shape, np.nan if value.dtype.kind == "f" else 0, value.dtype)
        outputs[name][(slice(None),) * axis + (rows,)] = value

    def _finish(self, inputs: Mapping[str, Any], outputs: dict[str, Any]) -> dict[str, Any]:
        """Outputs in order, those that the model computes from its prediction included."""
        tail = self.data["tail"]
        if tail is not None:
            given = {"scores": outputs[self.data["prediction"]]} | dict(inputs)
            values = self.sessions[tail["file"]].run(None, {n: given[n] for n in tail["takes"]})
            outputs |= dict(zip(tail["gives"], values, strict=True))
        return {n: outputs[n] for n in self.data["outputs"] if n in outputs}


if __name__ == "__main__":
    found: Any = Program(Path(__file__).parent)(dict(np.load(sys.argv[1])))
    np.savez(sys.argv[2], **found)
