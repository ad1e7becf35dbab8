"""LitServe over row servers: every worker holds a program, and answers each row at its exit."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from eecompile.errors import EecompileError, MissingDependencyError
from eecompile.serving.server import RowServer

try:
    import litserve
    from fastapi import HTTPException

    from eecompile.serving.http import infer, refusal
except ImportError as e:
    raise MissingDependencyError("LitServe is not installed", hint="pip install 'eecompile[litserve]'") from e

if TYPE_CHECKING:
    from eecompile.module import CompiledModule


class RowAPI(litserve.LitAPI):  # type: ignore[misc, unused-ignore]
    """An API for `litserve.LitServer`, with the infer request of the Open Inference Protocol.

    Batches are those of the row server: `max_batch_size` of LitServe stays 1.

    Args:
        program: Gives the compiled module, called once in each worker: `functools.partial(load, "program")`.
        name: Of the model, in its address and in replies.
        options: Of each worker's `RowServer`: max_batch, max_wait_ms, max_queue.
    """

    def __init__(self, program: Callable[[], CompiledModule], *, name: str = "model", **options: Any) -> None:
        super().__init__(api_path=f"/v2/models/{name}/infer", enable_async=True)
        self.program, self.name, self.options = program, name, options

    def setup(self, device: str) -> None:
        """Called by LitServe in each worker, with the device that is the worker's."""
        self.server = RowServer(self.program().to(device), **self.options)

    # LitServe reads the annotations of these two: with none, a request is any JSON.
    async def decode_request(self, request):  # type: ignore[no-untyped-def]
        return request

    async def predict(self, body: Any) -> dict[str, Any]:
        try:
            return await infer(self.server, self.name, body)
        except EecompileError as e:
            status, headers = refusal(e)
            raise HTTPException(status, str(e), headers) from e

    async def encode_response(self, output):  # type: ignore[no-untyped-def]
        return output
