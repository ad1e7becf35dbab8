"""Serving: requests of one row each, run in batches, each answered at its exit."""

from __future__ import annotations

from eecompile.serving.server import Answer, RowServer, ServerBusy, ServerClosed

__all__ = ["Answer", "RowServer", "ServerBusy", "ServerClosed"]
