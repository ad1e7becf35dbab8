"""The Open Inference Protocol, version 2, over a row server: health, metadata, infer, and Prometheus metrics.

`infer` and `refusal` are shared with the adapters for Ray Serve and LitServe, which bring their own web servers.
"""

from __future__ import annotations

import asyncio
from typing import Any

import torch

from eecompile.errors import EecompileError, MissingDependencyError
from eecompile.serving.server import Answer, RowServer, ServerBusy, ServerClosed
from eecompile.signature import Leaf, Signature

try:
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse, Response
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
    try:
        rows: list[dict[str, Any]] = _rows(body, signature)
        given = dict(body.get("parameters") or {})
    except (ValueError, KeyError, TypeError, RuntimeError) as e:
        raise EecompileError("an infer request that cannot be read", got=f"{type(e).__name__}: {e}") from e
    limits = {k: given[k] for k in ("deadline_ms", "budget") if k in given}
    futures = [server.submit(**row, **limits) for row in rows]
    answers = await asyncio.gather(*(asyncio.wrap_future(f) for f in futures))
    return _reply(name, body.get("id"), answers, signature)


def refusal(error: EecompileError) -> tuple[int, dict[str, str]]:
    """Status and headers of the reply to a request that failed: 429 with Retry-After, 503, or 400."""
    if isinstance(error, ServerBusy):
        return 429, {"Retry-After": str(max(1, round(error.retry_after_s)))}
    return 503 if isinstance(error, ServerClosed) else 400, {}


async def respond(server: RowServer, name: str, request: Request) -> Any:
    """`infer` over HTTP: a JSON response, of an error too."""
    try:
        body = await request.json()
    except ValueError as e:
        return JSONResponse({"error": f"an infer request is JSON: {e}"}, 400)
    try:
        return JSONResponse(await infer(server, name, body))
    except EecompileError as e:
        status, headers = refusal(e)
        return JSONResponse({"error": str(e)}, status, headers)


def app(server: RowServer, name: str) -> Any:
    """A FastAPI application that serves one program."""
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

    for path in ("/v2/health/live", "/v2/health/ready", f"/v2/models/{name}/ready"):
        made.add_api_route(path, ready)
    made.add_api_route("/v2", about)
    made.add_api_route(f"/v2/models/{name}", metadata)
    made.add_api_route(f"/v2/models/{name}/infer", infers, methods=["POST"])
    made.add_api_route("/metrics", metrics)
    return made


def _rows(body: Any, signature: Signature) -> list[dict[str, Any]]:
    """The rows of a request, each as keyword arguments with a batch of 1."""
    if not isinstance(body, dict) or not isinstance(body.get("inputs"), list):
        raise EecompileError("an infer request holds a list of inputs", got=type(body).__name__, wanted='{"inputs": [...]}')
    given = {i["name"]: torch.tensor(i["data"], dtype=DTYPES[i["datatype"]]).reshape(i["shape"]) for i in body["inputs"]}
    axes = {leaf.path: leaf.batch_axis for leaf in signature.inputs}
    if given.keys() != axes.keys():
        raise EecompileError("other inputs than the model's", got=", ".join(given), wanted=", ".join(axes))
    batched = {n: axis for n, axis in axes.items() if axis is not None}
    counts = {given[n].shape[axis] for n, axis in batched.items()}
    if len(counts) != 1:
        raise EecompileError("the inputs have different numbers of rows", got=sorted(counts))
    return [{n: t.narrow(batched[n], b, 1) if n in batched else t for n, t in given.items()} for b in range(counts.pop())]


def _reply(name: str, id: Any, answers: list[Answer], signature: Signature) -> dict[str, Any]:
    leaves = [signature.flatten_output(a.output) for a in answers]
    outputs = []
    for i, leaf in enumerate(signature.outputs):
        value = leaves[0][i] if leaf.batch_axis is None else torch.cat([line[i] for line in leaves], leaf.batch_axis)
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
