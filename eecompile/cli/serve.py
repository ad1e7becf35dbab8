"""`serve`: a saved program over HTTP, each row answered at its exit."""

from __future__ import annotations

from typing import Annotated

import typer

from eecompile.cli import options as o
from eecompile.cli.out import reporting


def serve(
    directory: o.Saved,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on.")] = 8000,
    name: Annotated[str, typer.Option(help="Name of the model in its addresses.")] = "model",
    max_batch: Annotated[int, typer.Option(help="Most rows that run together.")] = 32,
    max_wait_ms: Annotated[float, typer.Option(help="How long a row waits for others.")] = 2.0,
    max_queue: Annotated[int, typer.Option(help="Most rows that wait; further ones get status 429.")] = 1024,
    debug: o.Debug = False,
) -> None:
    """Serve a saved program: Open Inference Protocol v2, with Prometheus metrics at /metrics.

    Needs fastapi, uvicorn and prometheus-client: pip install 'eecompile[serve]'.
    """
    with reporting(False) as out:
        from eecompile import MissingDependencyError, load
        from eecompile.serving.http import app
        from eecompile.serving.metrics import Metrics
        from eecompile.serving.server import RowServer

        try:
            import uvicorn
        except ImportError as e:
            raise MissingDependencyError("serve needs uvicorn", hint="pip install 'eecompile[serve]'") from e
        with RowServer(
            load(directory), max_batch=max_batch, max_wait_ms=max_wait_ms, max_queue=max_queue, metrics=Metrics()
        ) as server:
            out.say(f"http://{host}:{port}/v2/models/{name}/infer")
            uvicorn.run(app(server, name), host=host, port=port, log_level="warning")
