"""The Open Inference Protocol, version 2, over a row server: health, metadata, infer, and Prometheus metrics.

`infer` and `refusal` are shared with the adapters for Ray Serve and LitServe, which bring their own web servers.
"""

from __future__ import annotations

import asyncio
import math
import re
from concurrent.futures import Future
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eecompile.errors import EecompileError, MissingDependencyError, check_name, shown
from eecompile.plain import LARGEST, check_kind
from eecompile.serving.server import Answer, RowServer, ServerBusy, ServerClosed
from eecompile.signature import Leaf, Signature

try:
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse, Response
    from starlette.exceptions import HTTPException
except ImportError as e:
    raise MissingDependencyError("serving needs fastapi", hint="pip install 'eecompile[serve]'") from e

DTYPES = {
    "BOOL": torch.bool, "UINT8": torch.uint8, "INT8": torch.int8, "INT16": torch.int16, "INT32": torch.int32,
    "INT64": torch.int64, "FP16": torch.float16, "BF16": torch.bfloat16, "FP32": torch.float32, "FP64": torch.float64,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}


async def infer(server: RowServer, name: str, body: Any) -> dict[str, Any]:
    """The reply to an infer request, as JSON data.

    A request of several rows is split; its reply comes when the last of them has left. `parameters` of a request may hold
    `deadline_ms` and `budget`; those of the reply hold `exit_index`, `confidence` and `cost` of each row.

    Raises:
        ServerBusy: The queue is full.
        ServerClosed: The server has been closed, or its worker has died.
        EecompileError: The request does not fit the model.
    """
    signature = server.fast.program.signature
    if not isinstance(body, dict) or not isinstance(body.get("inputs"), list):
        raise EecompileError("an infer request holds a list of inputs", got=type(body).__name__, wanted='{"inputs": [...]}')
    given, id, asked = body.get("parameters") or {}, body.get("id"), body.get("outputs")
    check_kind("parameters", given, dict, '{"deadline_ms": 5}')
    check_kind("id", id, (str, type(None)), "text")
    names = None if asked is None else _asked(asked, [leaf.path for leaf in signature.outputs])
    rows = _rows(body["inputs"], signature)
    if len(rows) > server.max_queue:
        raise EecompileError(
            "more rows than this server queues",
            got=len(rows),
            wanted=f"at most {server.max_queue}",
            hint="send fewer",
        )
    limits = {k: given[k] for k in ("deadline_ms", "budget") if k in given}
    futures: list[Future[Answer]] = []
    try:
        futures.extend(server.submit(**row, **limits) for row in rows)
    except EecompileError:
        for future in futures:  # nobody waits for them any more
            future.cancel()
        raise
    answers = await asyncio.gather(*(asyncio.wrap_future(f) for f in futures))
    return _reply(name, id, answers, signature, names)


def refusal(error: EecompileError) -> tuple[int, dict[str, str]]:
    """Status and headers of the reply to a request that failed: 429 with Retry-After, 503, or 400."""
    if isinstance(error, ServerBusy):
        return 429, {"Retry-After": str(max(1, round(error.retry_after_s)))}
    return 503 if isinstance(error, ServerClosed) else 400, {}


async def respond(server: RowServer, name: str, request: Request) -> Any:
    """`infer` over HTTP: a JSON response, of an error too."""
    try:
        body = await request.json()
    except (ValueError, RecursionError) as e:
        return JSONResponse({"error": f"an infer request is JSON: {e}"}, 400)
    try:
        return JSONResponse(await infer(server, name, body))
    except EecompileError as e:
        status, headers = refusal(e)
        return JSONResponse({"error": str(e)}, status, headers)
    except Exception as e:  # noqa: BLE001 (whatever the model raises; the server goes on)
        return JSONResponse({"error": f"the model failed on this batch: {type(e).__name__}: {e}"}, 500)


def app(server: RowServer, name: str) -> Any:
    """A FastAPI application that serves one program.

    Raises:
        EecompileError: A name that would not be one part of an address.
    """
    if not re.fullmatch(r"[\w.-]+", name):
        wanted = "letters, digits, '_', '.' and '-'"
        raise EecompileError("the model's name is a part of its addresses", got=repr(name), wanted=wanted)
    made = FastAPI(title=f"eecompile: {name}")
    signature = server.fast.program.signature

    async def ready() -> Any:
        return JSONResponse({"ready": server.alive}, 200 if server.alive else 503)

    async def about() -> Any:
        return {"name": "eecompile", "version": "2", "extensions": []}

    async def metadata() -> Any:
        def tensor(leaf: Leaf) -> dict[str, Any]:
            shape = [-1 if isinstance(s, str) else s for s in leaf.shape]
            return {"name": leaf.path, "datatype": NAMES[leaf.dtype], "shape": shape}

        return {
            "name": name,
            "versions": ["1"],
            "platform": "eecompile",
            "inputs": [tensor(leaf) for leaf in signature.inputs],
            "outputs": [tensor(leaf) for leaf in signature.outputs],
        }

    async def infers(request: Request) -> Any:
        return await respond(server, name, request)

    async def metrics() -> Any:
        text = b"" if server.metrics is None else server.metrics.text()
        return Response(text, media_type="text/plain; version=0.0.4")

    async def nowhere(request: Request, error: Any) -> Any:
        said = f"{request.method} {request.url.path}: {error.detail}; the model here is /v2/models/{name}"
        return JSONResponse({"error": said}, error.status_code, error.headers)

    made.add_exception_handler(HTTPException, nowhere)
    for path in ("/v2/health/live", "/v2/health/ready", f"/v2/models/{name}/ready"):
        made.add_api_route(path, ready)
    made.add_api_route("/v2", about)
    made.add_api_route(f"/v2/models/{name}", metadata)
    made.add_api_route(f"/v2/models/{name}/infer", infers, methods=["POST"])
    made.add_api_route("/metrics", metrics)
    return made


def _rows(inputs: list[Any], signature: Signature) -> list[dict[str, Any]]:
    """The rows of a request, each as keyword arguments with a batch of 1."""
    read = [_tensor(item, f"inputs[{i}]") for i, item in enumerate(inputs)]
    given, leaves = dict(read), {leaf.path: leaf for leaf in signature.inputs}
    if len(given) != len(read) or given.keys() != leaves.keys():
        got = ", ".join(name for name, _ in read) or "none"
        raise EecompileError("other inputs than the model's", got=got, wanted=", ".join(leaves))
    for name, t in given.items():
        if t.ndim != len(leaves[name].shape):
            raise EecompileError("an input has another shape", where=name, got=list(t.shape), wanted=leaves[name].describe())
    batched = {n: leaf.batch_axis for n, leaf in leaves.items() if leaf.batch_axis is not None}
    counts = {given[n].shape[axis] for n, axis in batched.items()}
    if len(counts) != 1:
        raise EecompileError("the inputs have different numbers of rows", got=sorted(counts))
    if not (count := counts.pop()):
        raise EecompileError("an infer request without rows", got="a batch of 0", wanted="one row or more")
    return [{n: t.narrow(batched[n], b, 1) if n in batched else t for n, t in given.items()} for b in range(count)]


def _tensor(item: Any, where: str) -> tuple[str, Tensor]:
    """Name and value of an input as the request has it."""
    wanted = "name, datatype, shape and data"
    if not isinstance(item, dict) or any(key not in item for key in ("name", "datatype", "shape", "data")):
        got = f"{', '.join(map(str, item)) or 'nothing'} alone" if isinstance(item, dict) else type(item).__name__
        raise EecompileError("an input of an infer request lacks something", where=where, got=got, wanted=wanted)
    name, datatype, shape = item["name"], item["datatype"], item["shape"]
    check_kind(f"name of {where}", name, str, "text")
    check_name("datatype", datatype, DTYPES)
    if not isinstance(shape, list) or not all(type(size) is int and 0 <= size <= LARGEST for size in shape):
        raise EecompileError("a shape is a list of sizes", where=name, got=shown(shape)[:80], wanted="[1, 8]")
    try:
        numbers = np.array(item["data"])
    except ValueError:  # lists of different lengths
        numbers = np.array(None)
    if numbers.dtype.kind not in "bif":
        raise EecompileError("the data of an input are no numbers", where=name, wanted=f"numbers of {datatype}")
    value = torch.as_tensor(numbers).to(DTYPES[datatype])
    kept = value.isfinite() if value.is_floating_point() else value == torch.as_tensor(numbers)
    if not bool(kept.all()):
        raise EecompileError(
            f"the data of an input are no finite numbers of {datatype}",
            where=name,
            got=f"{int((~kept).sum())} of {value.numel()} like {numbers[~kept.numpy()].flat[0]}",
            wanted="numbers that this datatype holds",
        )
    if value.numel() != math.prod(shape):
        raise EecompileError(
            "the data of an input do not fill its shape", where=name, got=f"{value.numel()} numbers for {shape}"
        )
    return name, value.reshape(shape)


def _asked(outputs: Any, known: list[str]) -> list[str]:
    """Names of the outputs that a request asks for."""
    if not isinstance(outputs, list) or not all(isinstance(o, dict) for o in outputs):
        raise EecompileError("outputs are a list", got=shown(outputs)[:80], wanted='[{"name": "..."}]')
    for output in outputs:
        check_name("output", output.get("name"), known)
    return [output["name"] for output in outputs] or known


def _reply(
    name: str, id: Any, answers: list[Answer], signature: Signature, names: list[str] | None = None
) -> dict[str, Any]:
    leaves = [signature.flatten_output(a.output) for a in answers]
    outputs = []
    for i, leaf in enumerate(signature.outputs):
        if names is not None and leaf.path not in names:
            continue
        value = leaves[0][i] if leaf.batch_axis is None else torch.cat([line[i] for line in leaves], leaf.batch_axis)
        if not bool(value.isfinite().all()):
            raise EecompileError(
                "an output holds NaN or infinity, which JSON does not have", where=leaf.path, hint="look at these inputs"
            )
        data = {
            "name": leaf.path,
            "datatype": NAMES[value.dtype],
            "shape": list(value.shape),
            "data": value.flatten().tolist(),
        }
        outputs.append(data)
    reported = {
        "exit": [a.exit for a in answers],
        "exit_index": [a.exit_index for a in answers],
        "confidence": [a.confidence for a in answers],
        "cost": [a.cost for a in answers],
        "stopped": [a.stopped for a in answers],
    }
    reply = {"model_name": name, "model_version": "1", "outputs": outputs, "parameters": reported}
    return reply if id is None else {**reply, "id": id}
