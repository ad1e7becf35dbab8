"""A saved program in Triton's Python backend: a request is answered when the last of its rows has left.

In the model repository this file is NAME/1/model.py, the saved program NAME/1/program, and config.pbtxt NAME/config.pbtxt.
Decoupled mode is needed: without it Triton would hold the answers of all requests until the slowest row is done.
"""

from __future__ import annotations

import json
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import triton_python_backend_utils as pb_utils

from eecompile import EecompileError, load
from eecompile.serving import Answer, RowServer


class Reply:
    """The answers of one request, sent when the last is there, or as an error when one fails."""

    def __init__(self, request: Any, futures: list[Future[Answer]], model: TritonPythonModel) -> None:
        self.sender, self.futures, self.model = request.get_response_sender(), futures, model
        self.waiting, self.lock = len(futures), threading.Lock()
        for future in futures:
            future.add_done_callback(self.done)

    def done(self, _: Future[Answer]) -> None:
        with self.lock:
            self.waiting -= 1
            last = self.waiting == 0
        if last:
            self.model.send(self.sender, self.futures)


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        self.inputs = [i["name"] for i in config["input"]]
        self.outputs = [o["name"] for o in config["output"]]  # the class scores, then exit_index and confidence
        options = {k: float(v["string_value"]) for k, v in config.get("parameters", {}).items()}
        self.fast = load(Path(args["model_repository"]) / args["model_version"] / "program")
        self.server = RowServer(
            self.fast, max_batch=int(options.get("max_batch", 32)), max_wait_ms=options.get("max_wait_ms", 2.0)
        )

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            futures: list[Future[Answer]] = []
            try:
                arrays = {n: pb_utils.get_input_tensor_by_name(request, n).as_numpy() for n in self.inputs}
                whole = {n: torch.from_numpy(a.copy()) for n, a in arrays.items()}
                rows = zip(*(t.split(1) for t in whole.values()), strict=True)
                futures.extend(self.server.submit(**dict(zip(whole, row, strict=True))) for row in rows)
            except EecompileError as error:  # inputs that do not fit, or a full queue
                for future in futures:
                    future.cancel()
                self.refuse(request.get_response_sender(), error)
            else:
                Reply(request, futures, self)

    def send(self, sender: Any, futures: list[Future[Answer]]) -> None:
        try:
            answers = [future.result() for future in futures]
            scores = torch.cat([self.fast.prediction_of(a.output) for a in answers])
        except Exception as error:  # noqa: BLE001  whatever a model raises belongs to the caller
            self.refuse(sender, error)
            return
        index = torch.tensor([a.exit_index for a in answers])
        confidence = torch.tensor([a.confidence for a in answers])
        values = zip(self.outputs, (scores, index, confidence), strict=False)
        tensors = [pb_utils.Tensor(name, value.numpy()) for name, value in values]
        sender.send(pb_utils.InferenceResponse(tensors), flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def refuse(self, sender: Any, error: Exception) -> None:
        response = pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error)))
        sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def finalize(self) -> None:
        self.server.close()
