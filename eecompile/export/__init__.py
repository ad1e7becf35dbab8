"""Programs that leave Python: `export` writes one for a runtime, `verify_export` runs it there and compares."""

from eecompile.export.stages import stage_inputs
from eecompile.export.targets import TARGETS
from eecompile.export.verify import ExportReport, export, verify_export

__all__ = ["TARGETS", "ExportReport", "export", "stage_inputs", "verify_export"]
