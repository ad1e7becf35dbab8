"""Ray Serve over row servers: every replica holds a program, and answers each row at its exit."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from eecompile.errors import MissingDependencyError
from eecompile.serving.server import RowServer, ServerClosed

try:
    from ray import serve
    from starlette.requests import Request

    from eecompile.serving.http import infer, respond
except ImportError as e:
    raise MissingDependencyError("Ray Serve is not installed", hint="pip install 'eecompile[ray]'") from e

if TYPE_CHECKING:
    from eecompile.module import CompiledModule


class Replica:
    """One process of a deployment, with a row server of its own."""

    def __init__(self, program: Callable[[], CompiledModule], name: str, options: dict[str, Any]) -> None:
        self.server, self.name = RowServer(program(), **options), name

    async def __call__(self, request: Request) -> Any:
        """A POST to any path below the route: an infer request of the Open Inference Protocol."""
        return await respond(self.server, self.name, request)

    async def infer(self, body: dict[str, Any]) -> dict[str, Any]:
        """The same by a handle, without HTTP: `handle.infer.remote(body)`."""
        return await infer(self.server, self.name, body)

    def check_health(self) -> None:
        """Ray starts another replica in place of one whose worker has died."""
        if not self.server.alive:
            raise ServerClosed("the row server of this replica does not take rows any more")


def rows(program: Callable[[], CompiledModule], *, name: str = "model", replicas: int = 1, **options: Any) -> Any:
    """An application for `serve.run`.

    Args:
        program: Gives the compiled module, called once in each replica: `functools.partial(load, "/shared/program")`.
        name: Of the model in replies, and of the deployment.
        replicas: Processes that share the requests.
        options: Of each replica's `RowServer`: max_batch, max_wait_ms, max_queue.
    """
    at_once = options.get("max_batch", 32) + options.get("max_queue", 1024)  # with fewer, no batch would fill
    made = serve.deployment(Replica, name=name, num_replicas=replicas, max_ongoing_requests=at_once)
    return made.bind(program, name, options)
