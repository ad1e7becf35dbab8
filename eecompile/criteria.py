"""How sure an exit is: the criteria, as options. What each computes is in `kernels/confidence.py`.

All of them give a confidence in [0, 1], higher is surer, from logits `[n, C]` (or `[n, S, C]`, reduced over the
positions). One logit alone, `C = 1`, says yes or no: it is compared with 0, the logit of no.

A sample leaves where `confidence >= threshold`; NaN is never sure.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

from eecompile.errors import StrategyError, check_name, near
from eecompile.plain import check_switches, plain

REDUCTIONS = ("min", "mean", "last")


@dataclass(frozen=True)
class Criterion:
    """One way to say how sure an exit is.

    Args:
        reduce: How the positions of an output `[n, S, C]` become one confidence per row: "min", "mean" or "last".
        multi_label: Whether each score of `[n, C]` says yes or no by itself, of labels that may hold at once; they are then
            reduced as positions are, so that a row is as sure as its least sure label. Set by itself where a model ends in a
            sigmoid.
    """

    name: ClassVar[str] = ""
    stateful: ClassVar[bool] = False
    learned: ClassVar[bool] = False
    routed: ClassVar[bool] = False
    default_threshold: ClassVar[float] = 0.9

    reduce: str = "min"
    multi_label: bool = False

    def __post_init__(self) -> None:
        check_name("reduction over positions", self.reduce, REDUCTIONS, StrategyError)
        check_switches(type(self), vars(self), StrategyError)

    @property
    def patience(self) -> int:
        return 1

    @property
    def at_end(self) -> Criterion:
        """What is reported at the model's own end, where there is neither a learned score nor a router."""
        other = self.learned or self.routed
        return MaxProbability(reduce=self.reduce, multi_label=self.multi_label) if other else self

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, **asdict(self)}


@dataclass(frozen=True)
class MaxProbability(Criterion):
    """The largest softmax probability."""

    name: ClassVar[str] = "max_probability"


@dataclass(frozen=True)
class Entropy(Criterion):
    """One minus the softmax entropy over its maximum, log C (BranchyNet, Teerapittayanon et al. 2016)."""

    name: ClassVar[str] = "entropy"


@dataclass(frozen=True)
class Margin(Criterion):
    """Largest minus second largest softmax probability."""

    name: ClassVar[str] = "margin"


@dataclass(frozen=True)
class Energy(Criterion):
    """Free energy, logsumexp of the logits less log C, squashed to [0, 1] by a softsign (Liu et al. 2020)."""

    name: ClassVar[str] = "energy"


@dataclass(frozen=True)
class Patience(Criterion):
    """Consecutive open exits that agree, over `exits_in_agreement` (PABEE, Zhou et al. 2020).

    Confidence is 1 once that many exits in a row, this one included, predict the same class.
    """

    name: ClassVar[str] = "patience"
    stateful: ClassVar[bool] = True
    default_threshold: ClassVar[float] = 1.0

    exits_in_agreement: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "exits_in_agreement", plain(self.exits_in_agreement))
        if self.exits_in_agreement < 1:
            raise StrategyError("patience counts at least one exit", got=self.exits_in_agreement, wanted="an integer >= 1")

    @property
    def patience(self) -> int:
        return self.exits_in_agreement


@dataclass(frozen=True)
class Learned(Criterion):
    """A score that is trained to say whether the exit is right (BERxiT, Xin et al. 2021): sigmoid of one logit."""

    name: ClassVar[str] = "learned"
    learned: ClassVar[bool] = True
    default_threshold: ClassVar[float] = 0.9


@dataclass(frozen=True)
class Routed(Criterion):
    """No property of the exit's output: the router's probability that the row needs at most this exit."""

    name: ClassVar[str] = "routed"
    routed: ClassVar[bool] = True
    default_threshold: ClassVar[float] = 0.5


KINDS = (MaxProbability, Entropy, Margin, Energy, Patience, Learned, Routed)
CRITERIA: dict[str, type[Criterion]] = {c.name: c for c in KINDS}


def criterion(spec: str | Criterion | dict[str, Any]) -> Criterion:
    """A criterion from its name, its `to_dict()` or itself.

    Raises:
        StrategyError: The name or an option is unknown; the message lists the valid ones.
    """
    if isinstance(spec, Criterion):
        return spec
    options = dict(spec) if isinstance(spec, dict) else {"name": spec}
    name = options.pop("name", None)
    if not isinstance(name, str) or name not in CRITERIA:
        raise StrategyError("unknown criterion", got=repr(name), wanted=near(str(name), CRITERIA))
    chosen = CRITERIA[name]
    valid = [f.name for f in fields(chosen)]
    for option in options:
        if option not in valid:
            raise StrategyError(f"criterion {name!r} has no such option", got=repr(option), wanted=near(str(option), valid))
    return chosen(**options)
