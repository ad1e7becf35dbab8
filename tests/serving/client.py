"""A client of the Open Inference Protocol: JSON over HTTP, and what replies must say."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from eecompile import CompiledModule


def asked(url: str, body: Any = None) -> tuple[int, Any, Any]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=30) as reply:
            return reply.status, json.loads(reply.read()), reply.headers
    except urllib.error.HTTPError as e:
        return e.code, json.loads(e.read()), e.headers


def infer(rows: Tensor, **more: Any) -> dict[str, Any]:
    data = {"name": "input", "datatype": "FP32", "shape": list(rows.shape), "data": rows.flatten().tolist()}
    return {"inputs": [data], **more}


def check_replies(
    fast: CompiledModule, rows: Tensor, ask: Callable[[dict[str, Any]], dict[str, Any]], threads: int = 8
) -> None:
    """Asks for every row by itself, from several threads: none is lost, and each gets its own answer."""
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(ask, [infer(row[None], id=str(i)) for i, row in enumerate(rows)]))
    wanted = fast.run(rows)
    assert [r for r in replies if "outputs" not in r] == []
    assert [r["id"] for r in replies] == [str(i) for i in range(len(rows))]
    torch.testing.assert_close(torch.tensor([r["outputs"][0]["data"] for r in replies]), wanted.output)
    assert [r["parameters"]["exit_index"][0] for r in replies] == wanted.exit_index.tolist()
    assert len(set(wanted.exit_index.tolist())) == len(fast.exits) + 1  # rows leave everywhere
