"""The words that promises of calibration share."""

from __future__ import annotations


def loss_in_words(target: str, max_drop: float, model: str, answers: str, whole: str) -> str:
    """What is bounded.

    Args:
        target: "accuracy", "agreement" or "metric".
        model: What accuracy is compared with.
        answers: Whose answers the early ones are compared with.
        whole: What a metric is compared with.
    """
    drop = f"{100 * max_drop:g}%"
    return {
        "accuracy": f"accuracy drops by at most {drop} against {model}",
        "agreement": f"at most {drop} of the answers differ from {answers}",
        "metric": f"the mean metric drops by at most {max_drop:g} against {whole}",
    }[target]


def proven(loss: str, delta: float, rows: int, p_value: float | None, level: float | None) -> str:
    """A bound that was shown on `rows` rows."""
    return (
        f"With probability at least {100 * (1 - delta):g}% over the calibration data, {loss} on inputs drawn like it "
        f"(Learn then Test on {rows} rows, p = {p_value:.2g} at level {level:.2g})."
    )
