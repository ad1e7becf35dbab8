"""A row server: each row answered at its exit, none lost, none mixed up."""

from __future__ import annotations

import asyncio
import json
import math
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import Future
from statistics import median
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from eecompile import CompiledModule, eecompile, strategies
from eecompile.errors import CaptureError, EecompileError, StrategyError
from eecompile.serving import Answer, RowServer, ServerBusy, ServerClosed
from tests.serving.client import asked, infer
from tests.serving.conftest import Slow
from tests.serving.whole import WholeBatches, paced


def same(fast: CompiledModule, rows: Tensor, answers: list[Answer]) -> None:
    wanted = fast.run(rows)
    assert [a.exit_index for a in answers] == wanted.exit_index.tolist()
    torch.testing.assert_close(torch.cat([a.output for a in answers]), wanted.output)
    torch.testing.assert_close(torch.tensor([a.confidence for a in answers]), wanted.confidence)
    torch.testing.assert_close(torch.tensor([a.cost for a in answers]), wanted.cost)


def test_answers_are_those_of_one_call(fast: CompiledModule, rows: Tensor) -> None:
    assert len(set(fast.run(rows).exit_index.tolist())) == 3  # rows leave everywhere
    with RowServer(fast, max_batch=16, max_wait_ms=5) as server:
        futures = [server.submit(r[None]) for r in rows]
        answers = [f.result(30) for f in futures]
    same(fast, rows, answers)
    assert all(a.final and a.stopped is None and a.output.shape == (1, 3) for a in answers)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.integers(0, 63), st.sampled_from([0.0, 0.0, 0.0, 0.002])), min_size=1, max_size=40),
    st.integers(1, 9),
)
def test_rows_are_never_mixed_up(fast: CompiledModule, rows: Tensor, arrivals: list[tuple[int, float]], most: int) -> None:
    with RowServer(fast, max_batch=most, max_wait_ms=1) as server:
        futures = []
        for i, pause in arrivals:
            time.sleep(pause)
            futures.append(server.submit(rows[i : i + 1]))
        answers = [f.result(30) for f in futures]
    same(fast, rows[[i for i, _ in arrivals]], answers)


def test_rows_that_leave_early_are_answered_while_others_go_on(
    fast: CompiledModule, rows: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    early, late = (int((fast.run(rows).exit_index == k).nonzero()[0]) for k in (0, 2))
    order: list[str] = []
    stream, listening = fast.stream, threading.Event()
    monkeypatch.setattr(fast, "stream", lambda *args: stream(*args) if listening.wait(30) else None)  # callbacks come first
    with RowServer(fast, max_batch=2, max_wait_ms=1000) as server:
        for name, i in (("late", late), ("early", early)):
            server.submit(rows[i : i + 1]).add_done_callback(lambda _, name=name: order.append(name))
        listening.set()
    assert order == ["early", "late"]


def test_rows_at_their_exits_have_a_lower_p50_at_equal_throughput(
    fast: CompiledModule, rows: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stages that take a fixed time for each row that reaches them, whatever else the machine does."""
    index = fast.run(rows).exit_index
    mix = torch.cat([(index == k).nonzero()[:n, 0] for k, n in ((0, 8), (1, 4), (2, 4))])
    stream, ended = fast.stream, [0.25, 0.5]

    def slowed(*args: Any, **kwargs: Any) -> Iterator[Any]:
        left, done = 16, 0.0
        for result in stream(*args, **kwargs):
            reached = int(result.exit_index.max())
            share = ended[reached] if reached < 2 else 1.0
            time.sleep(0.03 * left * (share - done))
            left, done = int((~result.final).sum()), share
            yield result

    monkeypatch.setattr(fast, "stream", slowed)
    burst = [{"input": rows[i : i + 1]} for i in mix.tolist()]
    p50, seconds = {}, {}
    for kind in (RowServer, WholeBatches):
        with kind(fast, max_batch=16, max_wait_ms=500) as server:
            p50[kind] = median(paced(server, burst, 2, 0.6))
            began = time.perf_counter()
            paced(server, burst, 2, 0.0)
            seconds[kind] = time.perf_counter() - began
    assert p50[RowServer] <= 0.7 * p50[WholeBatches]
    assert seconds[RowServer] <= 1.25 * seconds[WholeBatches]  # the same work; the rest is for a busy machine


def test_a_caller_may_write_to_its_tensor_after_submit(fast: CompiledModule, rows: Tensor) -> None:
    with RowServer(fast, max_batch=2, max_wait_ms=50) as server:
        mine = rows[:1].clone()
        future = server.submit(mine)
        mine.zero_()
        same(fast, rows[:1], [future.result(30)])


@pytest.mark.parametrize("each", [100, pytest.param(1250, marks=pytest.mark.nightly)])
def test_many_threads_lose_nothing(fast: CompiledModule, rows: Tensor, each: int) -> None:
    found: dict[int, Answer] = {}
    with RowServer(fast, max_batch=32, max_queue=10_000) as server:

        def ask(first: int) -> None:
            waiting = [(i, server.submit(rows[i % 64][None])) for i in range(first, first + each)]
            found.update((i, f.result(60)) for i, f in waiting)

        threads = [threading.Thread(target=ask, args=(each * t,)) for t in range(8)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    count = 8 * each
    assert len(found) == count
    same(fast, rows.repeat(count // 64 + 1, 1)[:count], [found[i] for i in range(count)])


class Sequence(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Slow() for _ in range(3))
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


def test_rows_of_other_shapes_run_in_batches_of_their_own() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        chosen = strategies.Branchy(exits=("layers.0",))
        made = eecompile(Sequence().eval(), chosen, example_inputs=(torch.randn(3, 9, 8),), dynamic={"x": {1: "length"}})
        inputs = [torch.randn(1, n, 8) for n in (5, 9, 5, 12, 9)]
    with RowServer(made) as server:
        answers = [f.result(30) for f in [server.submit(x) for x in inputs]]
    for x, a in zip(inputs, answers, strict=True):
        torch.testing.assert_close(a.output, made(x))


def test_budget_and_deadline_stop_a_row(fast: CompiledModule, rows: Tensor) -> None:
    last = rows[fast.run(rows).exit_index == 2][:1]
    costs = fast.costs([True, True]).tolist()
    with RowServer(fast) as server:
        a = server(last, budget=(costs[0] + costs[1]) / 2)
        assert (a.exit, a.final, a.stopped) == ("exit_0", False, "budget") and a.cost == pytest.approx(costs[0])
        b = server(last, deadline_ms=0)
        assert (b.exit, b.final, b.stopped) == ("exit_0", False, "deadline")
        c = server(last, deadline_ms=60_000, budget=fast.costs([True, True]).tolist()[-1])
        assert (c.exit, c.final, c.stopped) == ("model", True, None)


class Held:
    """Keeps a server's worker busy until it is let go."""

    def __init__(self, server: RowServer, monkeypatch: pytest.MonkeyPatch, error: BaseException | None = None) -> None:
        self.go, self.entered = threading.Event(), threading.Event()
        stream = server._stream

        def wait(batch: Any) -> None:
            self.entered.set()
            assert self.go.wait(30)
            if error is not None:
                raise error
            stream(batch)

        monkeypatch.setattr(server, "_stream", wait)


def test_a_full_queue_refuses(fast: CompiledModule, rows: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    with RowServer(fast, max_batch=1, max_wait_ms=0, max_queue=2) as server:
        held = Held(server, monkeypatch)
        futures = [server.submit(rows[:1])]
        assert held.entered.wait(30)
        futures += [server.submit(rows[:1]) for _ in range(2)]
        with pytest.raises(ServerBusy) as busy:
            server.submit(rows[:1])
        assert busy.value.retry_after_s > 0 and server.waiting == 2
        held.go.set()
        assert [f.result(30).exit_index for f in futures] == fast.run(rows[:1]).exit_index.tolist() * 3


def test_an_error_fails_its_batch_alone(fast: CompiledModule, rows: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    with RowServer(fast, max_batch=1) as server:
        with monkeypatch.context() as patch:
            held = Held(server, patch, RuntimeError("out of memory"))
            bad = server.submit(rows[:1])
            held.go.set()
            with pytest.raises(RuntimeError, match="out of memory"):
                bad.result(30)
        same(fast, rows[:1], [server(rows[:1])])


def test_a_worker_that_dies_fails_what_waits(fast: CompiledModule, rows: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    server = RowServer(fast, max_batch=1, max_wait_ms=0)
    held = Held(server, monkeypatch, SystemExit("killed"))
    futures: list[Future[Answer]] = [server.submit(rows[:1])]
    assert held.entered.wait(30)
    futures += [server.submit(rows[:1]) for _ in range(3)]
    held.go.set()
    for f in futures:
        with pytest.raises(ServerClosed, match="killed"):
            f.result(30)
    assert not server.alive
    with pytest.raises(ServerClosed):
        server.submit(rows[:1])


def test_bad_requests_are_refused_at_once(fast: CompiledModule, rows: Tensor) -> None:
    with RowServer(fast) as server:
        with pytest.raises(StrategyError, match="one row"):
            server.submit(rows[:2])
        with pytest.raises(CaptureError):
            server.submit(torch.randn(1, 7))
        with pytest.raises(StrategyError, match="another device"):
            server.submit(torch.randn(1, 8, device="meta"))
        for limits in ({"budget": -5}, {"budget": float("nan")}, {"deadline_ms": "5"}):
            with pytest.raises(StrategyError):
                server.submit(rows[:1], **limits)
    with pytest.raises(ServerClosed):
        server.submit(rows[:1])
    with pytest.raises(StrategyError, match="max_batch"):
        RowServer(fast, max_batch=0)


# ---------------------------------------------------------------------- over HTTP


def one(**other: Any) -> dict[str, Any]:
    """A request of one row, with other fields of its input."""
    return {"inputs": [{"name": "input", "datatype": "FP32", "shape": [1, 8], "data": [0.5] * 8} | other]}


@pytest.fixture(scope="module")
def address(fast: CompiledModule) -> Iterator[tuple[str, RowServer]]:
    uvicorn = pytest.importorskip("uvicorn")
    pytest.importorskip("fastapi")
    from eecompile.serving.http import app
    from eecompile.serving.metrics import Metrics

    with RowServer(fast, max_queue=64, metrics=Metrics()) as server:
        http = uvicorn.Server(
            uvicorn.Config(app(server, "net"), host="127.0.0.1", port=0, log_level="error", lifespan="off")
        )
        thread = threading.Thread(target=http.run, daemon=True)
        thread.start()
        for _ in range(600):
            if http.started:
                break
            time.sleep(0.05)
        port = http.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}", server
        http.should_exit = True
        thread.join()


def test_protocol_over_http(address: tuple[str, RowServer], fast: CompiledModule, rows: Tensor) -> None:
    base, _ = address
    assert asked(f"{base}/v2/health/ready")[:2] == (200, {"ready": True})
    meta = asked(f"{base}/v2/models/net")[1]
    assert meta["inputs"] == [{"name": "input", "datatype": "FP32", "shape": [-1, 8]}]
    status, reply, _ = asked(f"{base}/v2/models/net/infer", infer(rows[:6], id="a"))
    wanted = fast.run(rows[:6])
    assert status == 200 and reply["id"] == "a" and reply["outputs"][0]["shape"] == [6, 3]
    torch.testing.assert_close(torch.tensor(reply["outputs"][0]["data"]).view(6, 3), wanted.output)
    assert reply["parameters"]["exit_index"] == wanted.exit_index.tolist()
    with urllib.request.urlopen(f"{base}/metrics", timeout=30) as scraped:
        assert 'eecompile_rows_total{exit="exit_0"}' in scraped.read().decode()


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({}, "holds a list of inputs"),
        ([], "holds a list of inputs"),
        ({"inputs": ["input"]}, "lacks something"),
        ({"inputs": [{"name": "input", "datatype": "FP32", "shape": [1, 8]}]}, "name, datatype, shape alone"),
        (one(name="other"), "other inputs than the model's"),
        (one(name=3), "name of inputs[0]"),
        ({"inputs": one()["inputs"] * 2}, "input, input"),
        (one(datatype="FP33"), "did you mean FP32"),
        (one(datatype=[]), "unknown datatype"),
        (one(datatype="INT64", data=[1] * 8), "int64[1, 8]"),
        (one(datatype="INT64", data=[1.5] * 8), "no finite numbers of INT64"),
        (one(datatype="UINT8", data=[300] * 8), "no finite numbers of UINT8"),
        (one(datatype="FP16", data=[1e9] * 8), "no finite numbers of FP16"),
        (one(data=[math.nan] * 8), "8 of 8 like nan"),
        (one(data=["a"] * 8), "no numbers"),
        (one(data=[[0.0] * 7, [0.0]]), "no numbers"),
        (one(data=[10**400] * 8), "no numbers"),
        (one(data=[0.0] * 7), "7 numbers for [1, 8]"),
        (one(shape=[1, 7], data=[0.0] * 7), "float32[1, 7]"),
        (one(shape=[], data=[0.0]), "another shape"),
        (one(shape=[-1, 8]), "a list of sizes"),
        (one(shape="18"), "a list of sizes"),
        (one(shape=[0, 8], data=[]), "without rows"),
        (one(shape=[65, 8], data=[0.0] * 520), "at most 64"),
        (one() | {"parameters": "fast"}, "parameters is of another type"),
        (one() | {"parameters": {"deadline_ms": "5"}}, "deadline_ms= is a number"),
        (one() | {"id": 3}, "id is of another type"),
        (one() | {"outputs": [{"name": "logits"}]}, "unknown output"),
        (one() | {"outputs": "output"}, "outputs are a list"),
    ],
)
def test_bad_bodies_get_400(address: tuple[str, RowServer], body: Any, said: str) -> None:
    base, server = address
    status, reply, _ = asked(f"{base}/v2/models/net/infer", body)
    assert status == 400 and said in reply["error"]
    assert asked(f"{base}/v2/models/net/infer", one())[0] == 200 and server.waiting == 0


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"9" * 9000])
def test_what_is_no_json_gets_400(address: tuple[str, RowServer], body: bytes) -> None:
    request = urllib.request.Request(f"{address[0]}/v2/models/net/infer", body)
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=30)
    with refused.value as reply:
        assert reply.code == 400 and "an infer request is JSON" in json.loads(reply.read())["error"]


@pytest.mark.parametrize(
    ("path", "body", "status"), [("other", None, 404), ("other/infer", {}, 404), ("net/infer", None, 405)]
)
def test_other_addresses_are_refused_as_json(address: tuple[str, RowServer], path: str, body: Any, status: int) -> None:
    got, reply, _ = asked(f"{address[0]}/v2/models/{path}", body)
    assert got == status and "/v2/models/net" in reply["error"]


def test_a_model_that_fails_and_outputs_that_json_does_not_have(
    address: tuple[str, RowServer], fast: CompiledModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, server = address
    with monkeypatch.context() as patch:
        patch.setattr(server, "_stream", lambda batch: 1 / 0)
        status, reply, _ = asked(f"{base}/v2/models/net/infer", one())
    assert status == 500 and "ZeroDivisionError" in reply["error"]

    def gives_nan(batch: Any) -> None:
        for request in batch:
            request.future.set_result(Answer(torch.full((1, 3), math.nan), "model", 2, 0.0, 1.0, True, None))

    with monkeypatch.context() as patch:
        patch.setattr(server, "_stream", gives_nan)
        status, reply, _ = asked(f"{base}/v2/models/net/infer", one())
    assert status == 400 and "NaN or infinity" in reply["error"]
    status, reply, _ = asked(f"{base}/v2/models/net/infer", one() | {"outputs": [{"name": "output"}]})
    assert status == 200 and [o["name"] for o in reply["outputs"]] == ["output"]


def test_closing_while_requests_come_loses_none(fast: CompiledModule) -> None:
    pytest.importorskip("fastapi")
    from eecompile.serving.http import infer as answered

    server = RowServer(fast)

    async def all_of_them() -> list[Any]:
        asking = [asyncio.create_task(answered(server, "net", one())) for _ in range(50)]
        await asyncio.sleep(0.005)
        await asyncio.to_thread(server.close)
        asking += [asyncio.create_task(answered(server, "net", one()))]
        return await asyncio.wait_for(asyncio.gather(*asking, return_exceptions=True), 30)

    *found, last = asyncio.run(all_of_them())
    assert isinstance(last, ServerClosed)
    assert all(isinstance(f, ServerClosed) or f["outputs"] for f in found)


def test_rows_of_a_request_that_is_refused_are_taken_back(
    fast: CompiledModule, rows: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("fastapi")
    from eecompile.serving.http import infer as answered

    with RowServer(fast, max_batch=1, max_wait_ms=0, max_queue=3) as server:
        held = Held(server, monkeypatch)
        server.submit(rows[:1])
        assert held.entered.wait(30)
        kept = server.submit(rows[:1])
        with pytest.raises(ServerBusy):
            asyncio.run(answered(server, "net", infer(rows[:3])))
        held.go.set()
        assert kept.result(30)


def test_a_full_queue_gets_429(address: tuple[str, RowServer], rows: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    base, server = address
    with monkeypatch.context() as patch:
        held = Held(server, patch)
        patch.setattr(server, "max_queue", 1)
        waiting = [server.submit(rows[:1])]
        assert held.entered.wait(30)
        waiting.append(server.submit(rows[:1]))
        status, _, headers = asked(f"{base}/v2/models/net/infer", infer(rows[:1]))
        held.go.set()
        assert all(f.result(30) for f in waiting)
    assert status == 429 and int(headers["Retry-After"]) >= 1


@pytest.mark.parametrize("name", ["", "a/b", "a b", "{x}"])
def test_a_name_is_one_part_of_an_address(fast: CompiledModule, name: str) -> None:
    http = pytest.importorskip("eecompile.serving.http")
    with RowServer(fast) as server, pytest.raises(EecompileError, match="part of its addresses"):
        http.app(server, name)
