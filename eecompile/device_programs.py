"""The device half of the compiled module: how device programs are built, what they are, and whether they need the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from eecompile.errors import CaptureError
from eecompile.ir.settings import Settings
from eecompile.program import Program
from eecompile.runtime.device.check import NoSync
from eecompile.runtime.device.checking import check
from eecompile.runtime.device.executor import DeviceExecutor, Options
from eecompile.runtime.device.nodes import DeviceProgram
from eecompile.runtime.device.support import VERIFIED, support
from eecompile.runtime.outcome import Executor


class DevicePrograms:
    """What `CompiledModule` offers where decisions stay on the device."""

    program: Program
    thresholds: Tensor
    settings: Settings

    def _executor(self, name: str) -> Executor:
        raise NotImplementedError

    def _automatic(self) -> tuple[str, str]:
        """What "auto" is here, and why."""
        found = support(self.thresholds.device)
        if found.way == "none" or self.program.front_end == "blocks":
            return "compact", "auto takes it: it computes the survivors only"
        if not VERIFIED:
            return "compact", "auto takes it: the device executor has not been verified on a GPU yet"
        if found.way == "bound":
            return "compact", f"auto takes it: {found.reason}"
        return "device", "auto takes it on this device"

    @property
    def device_options(self) -> Options:
        """How device programs are built: buckets, structure, how many are kept. Setting it drops those that are there."""
        found: Options = self.__dict__["_device_options"]
        return found

    @device_options.setter
    def device_options(self, options: Options) -> None:
        self.__dict__["_device_options"] = options
        for executor in self.__dict__["_executors"].values():
            if isinstance(executor, DeviceExecutor):
                executor.options = options
                executor.reset()

    def device_program(self, *args: Any, **kwargs: Any) -> DeviceProgram:
        """What a call with these inputs is on a device that takes all decisions itself, as data: `print(it.describe())`."""
        executor = self._executor("simulate")
        assert isinstance(executor, DeviceExecutor)
        return executor.device_program(self._given(args, kwargs), self.settings)[0]

    def check_no_sync(self, *args: Any, **kwargs: Any) -> NoSync:
        """Looks for anything in the device program that would need the host between input and output. Needs no GPU.

        Args:
            args: A call, for its shapes; without one, the example that the model was compiled with.

        Returns:
            A report with `.ok` and `.problems`: node, reason and line of the model's code of each.

        Raises:
            UnsupportedModelError: The model was captured as blocks.
            CaptureError: A loaded program, which has no example, and no call was given.
        """
        self._executor("simulate")  # says why where it cannot
        return check(self.program, self._given(args, kwargs), self.device_options)

    def _given(self, args: Any, kwargs: Any) -> Sequence[Tensor]:
        """A call's flat inputs; those of the example for none."""
        if args or kwargs:
            return self.program.signature.flatten(args, kwargs)
        example: tuple[Tensor, ...] | None = self.__dict__["example"]
        if example is None:
            raise CaptureError("a loaded program has no example inputs", hint="pass a call's arguments")
        return [t.to(self.thresholds.device) for t in example]
