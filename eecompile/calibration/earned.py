"""Whether every model of a cascade earns its place on the data: one that costs more must be better."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from eecompile.errors import CalibrationError

if TYPE_CHECKING:
    from eecompile.module import CompiledModule


def check_models(fast: CompiledModule, score: Tensor, what: str) -> None:
    """Refuses a model that is dearer than the one before it and worse on the calibration rows.

    Args:
        score: `[n, E + 1]` of every exit and of the model's own end; higher is better.
        what: What the scores are: "accuracy", "agreement" or "metric".

    Raises:
        CalibrationError: With the score and the cost of both. `Cascade(order="given")` takes the models as they are.
    """
    program: Any = getattr(fast, "program", None)
    models = () if program is None else program.capture.models
    if not models or fast.strategy.together.get("order") == "given":
        return
    cuts = [e.cut for e in program.exits]
    at = [cuts.index(name) if name in cuts else len(cuts) for name in models]
    means, costs = score.mean(0).tolist(), fast.costs([True] * len(cuts)).tolist()
    for a, b in zip(range(len(at)), range(1, len(at)), strict=False):
        earlier, later = at[a], at[b]
        if costs[later] > costs[earlier] and means[later] < means[earlier]:
            said = [f"{models[k]}: {what} {means[at[k]]:.2%} at {costs[at[k]]:.1%} of the full model's cost" for k in (b, a)]
            raise CalibrationError(
                "a model of the cascade is slower and worse than the one before it",
                where=models[b],
                got="; ".join(said),
                wanted="a better answer for a higher cost",
                hint='leave it out, train it further, or pass Cascade(order="given") to keep it all the same',
            )
