"""What training and calibration need of a compiled module.

`eecompile.module` satisfies this; imports run one way, so nothing here imports it. B is the batch, E the
number of exits, C the number of classes. "Outputs" are prediction leaves: float, `[B, C]`, `[B, S, C]`, or
any other shape with the batch first where the task is not classification.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor, nn

from eecompile.criteria import Criterion
from eecompile.ir.settings import Settings
from eecompile.program import Result


class ExitLike(Protocol):
    """One exit, as `fast.exits` lists it."""

    @property
    def name(self) -> str: ...

    @property
    def depth(self) -> float: ...

    @property
    def criterion(self) -> Criterion: ...


class Compiled(Protocol):
    """The part of the compiled module that `fit`, `evaluate` and `calibrate` use."""

    training: bool
    trained_by_loss: bool

    @property
    def settings(self) -> Settings:
        """Thresholds, temperatures and all else that may be set."""

    @property
    def exits(self) -> Sequence[ExitLike]: ...

    @property
    def thresholds(self) -> Tensor:
        """[E] float32; above 1 an exit is closed."""

    @property
    def temperatures(self) -> Tensor:
        """[E + 1] float32; the last belongs to the model's own end."""

    def set_thresholds(self, thresholds: list[float]) -> None: ...

    def set_temperatures(self, temperatures: list[float]) -> None: ...

    def run(self, *args: Any, **kwargs: Any) -> Result:
        """In train mode with `outputs`, `confidences` and `scores`, differentiable."""

    def observe(self, *args: Any, **kwargs: Any) -> Result:
        """Evaluation semantics (layers in eval mode, whatever `training` says), no gradients, everything
        computed.

        `exit_index`, `confidence`, `cost` are those of the present thresholds; `outputs` and `confidences`
        (E + 1 each) and, for learned criteria, `scores` (E) are of every exit, left or not, closed or not.
        """

    def confidences_of(
        self, outputs: Sequence[Tensor], temperatures: Tensor, scores: Sequence[Tensor] | None = None
    ) -> tuple[Tensor, ...]:
        """E + 1 confidences `[n]` float32 of stored outputs `[n, C]`, with other temperatures, all exits
        open."""

    def observe_at(self, settings: Settings, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Result:
        """`observe` under other settings; those of the module stay as they are."""

    def costs(self, open_exits: tuple[bool, ...], settings: Settings | None = None) -> Tensor:
        """[E + 1] float32: share of the full model's FLOPs of a row that leaves at exit k, heads included; under the
        present settings, or those given."""

    def head_parameters(self) -> Iterator[nn.Parameter]: ...

    def trunk_parameters(self) -> Iterator[nn.Parameter]: ...

    def own_trunk(self, in_place: bool = False) -> None:
        """The trunk is about to be trained: in a copy, or in the user's model itself."""

    def prepare_training(self, trunk: bool) -> AbstractContextManager[Any] | None:
        """Train mode, with the trunk trainable or frozen.

        `requires_grad`, the mode and everything else of the user's model are as before when the context ends.
        """

    def prediction_of(self, output: Any) -> Tensor: ...

    def train(self, mode: bool = True) -> Any: ...

    def eval(self) -> Any: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def named_parameters(self) -> Iterable[tuple[str, nn.Parameter]]: ...

    def named_buffers(self) -> Iterable[tuple[str, Tensor]]: ...
