"""LitServe: two workers of a program, where litserve is installed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import Tensor

from eecompile import CompiledModule
from tests.serving.client import asked, check_replies, infer

pytest.importorskip("litserve")
pytestmark = pytest.mark.nightly
ROOT = Path(__file__).parents[2]

SERVER = """
import sys
from functools import partial

import litserve

from eecompile import load
from eecompile.serving.litserve_api import RowAPI

if __name__ == "__main__":
    api = RowAPI(partial(load, sys.argv[1]), name="net", max_batch=16, max_wait_ms=5)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=2)
    server.run(host="127.0.0.1", port=int(sys.argv[2]), generate_client_file=False, log_level="error")
"""


@pytest.fixture(scope="module")
def address(fast: CompiledModule, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    place = tmp_path_factory.mktemp("litserve")
    fast.save(place / "program")
    (place / "server.py").write_text(SERVER)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(place / "server.py"), str(place / "program"), str(port)]
    with (place / "log").open("w") as log:
        server = subprocess.Popen(
            command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=log, stderr=log, start_new_session=True
        )
    try:
        for _ in range(600):
            assert server.poll() is None, (place / "log").read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v2/models/net/infer"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def test_two_workers_answer_every_row(address: str, fast: CompiledModule, rows: Tensor) -> None:
    check_replies(fast, rows.repeat(4, 1), lambda body: asked(address, body)[1])


def test_inputs_that_do_not_fit_get_400(address: str, rows: Tensor) -> None:
    status, reply, _ = asked(address, infer(rows[:1, :7]))
    assert status == 400 and "input" in reply["detail"]
