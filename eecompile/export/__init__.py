"""Programs that leave Python: `export` writes one for a runtime, `verify_export` runs it there and compares."""

from eecompile.export.targets import TARGETS, export

__all__ = ["TARGETS", "export"]
