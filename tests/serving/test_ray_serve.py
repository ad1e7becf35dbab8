"""Ray Serve: two replicas of a program, where ray is installed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from eecompile import CompiledModule
from eecompile.serving import ServerClosed
from tests.serving.client import asked, check_replies, infer

ray = pytest.importorskip("ray")
serve = pytest.importorskip("ray.serve")
pytestmark = [pytest.mark.nightly, pytest.mark.filterwarnings("default")]  # ray's own warnings are not ours
PORT = 8123


@pytest.fixture(scope="module")
def deployed(fast: CompiledModule, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Path]]:
    from eecompile.serving.ray_serve import rows as application

    place = tmp_path_factory.mktemp("ray")
    fast.save(place / "program")

    def program() -> CompiledModule:
        """The saved one, which notes in which process it answers."""
        from eecompile import load

        made = load(place / "program")
        stream = made.stream

        def noted(*args: Any, **kwargs: Any) -> Any:
            (place / f"{os.getpid()}.answered").touch()
            return stream(*args, **kwargs)

        made.stream = noted  # type: ignore[method-assign]
        return made

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    handle = serve.run(application(program, replicas=2, max_batch=16, max_wait_ms=5), route_prefix="/net")
    yield handle, place
    serve.shutdown()
    ray.shutdown()


def test_two_replicas_answer_every_row(deployed: tuple[Any, Path], fast: CompiledModule, rows: Tensor) -> None:
    handle, place = deployed
    many = rows.repeat(8, 1)  # 512 requests
    check_replies(fast, many, lambda body: handle.infer.remote(body).result(timeout_s=60))
    assert len(list(place.glob("*.answered"))) == 2


def test_over_http(deployed: tuple[Any, Path], fast: CompiledModule, rows: Tensor) -> None:
    address = f"http://127.0.0.1:{PORT}/net"
    check_replies(fast, rows, lambda body: asked(address, body)[1])
    status, reply, _ = asked(address, infer(rows[:1, :7]))
    assert status == 400 and "input" in reply["error"]


def test_a_replica_whose_server_is_closed_is_unhealthy(fast: CompiledModule) -> None:
    from eecompile.serving.ray_serve import Replica

    replica = Replica(lambda: fast, "net", {})
    replica.check_health()
    replica.server.close()
    with pytest.raises(ServerClosed):
        replica.check_health()
