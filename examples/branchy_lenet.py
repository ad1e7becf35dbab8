"""B-LeNet (Teerapittayanon et al. 2016): LeNet on MNIST with branches after its first two convolutions.

The model is trained as usual and stays as it is: its branches are fitted to what it gives, each of the kind that is best
on rows held out. Thresholds are chosen on the validation part: once with a guarantee, once as the cheapest that lose at
most 0.5% there; for both branches, and for the first alone, as in the paper: on a model this small a decision costs time
that its FLOPs do not show.
"""

from __future__ import annotations

from eecompile import eecompile
from eecompile.strategies import Branchy
from examples import datasets
from examples._common import (
    PROMISES,
    Options,
    Record,
    evaluated,
    fitted,
    lenet_trunk,
    main,
    observed,
    rows_in,
    rows_of,
    timed,
    timed_as_onnx,
)

EXITS = ("relu", "relu_1")  # after the first and the second convolution
SIZES = (1, 32, 256)
STRICT = {"guaranteed": {"max_drop": 0.005, "delta": 0.05}, "empirical": {"max_drop": 0.005, "delta": None}}


def example(options: Options, record: Record) -> None:
    """From fitting to timing."""
    quick = options.quick
    trunk = lenet_trunk(quick=quick, seed=options.seed)
    parts = {part: datasets.loader(f"mnist:{part}", standin=quick, seed=options.seed) for part in datasets.PARTS}
    x = next(iter(parts["val"]))[0][:8]
    both = eecompile(trunk.model, Branchy(exits=EXITS), example_inputs=(x,))
    fit = fitted(both, parts["train"], "branchy-lenet-mnist", options, trunk, heads={})
    first = eecompile(trunk.model, Branchy(exits=EXITS[:1], head=both.exits[0].head_kind), example_inputs=(x,))
    first.branch("exit_0").load_state_dict(both.branch("exit_0").state_dict())
    sizes = {part: rows_in(loader) for part, loader in parts.items()}
    record.note(rows_of_data=sizes, model="LeNet", trunk=trunk.to_dict(), fit=fit)
    record.done("train")
    seen = observed(both, {part: parts[part] for part in ("val", "test")})
    promises = PROMISES if quick else STRICT  # the stand-in has too few rows to show a loss below 0.5%
    of_first = {part: everything.only(0) for part, everything in seen.items()}
    variants = [
        *evaluated(both, seen, record, "MNIST, LeNet, 2 exits", trunk.accuracy, promises),
        *evaluated(first, of_first, record, "MNIST, LeNet, 1 exit", trunk.accuracy, promises),
    ]
    record.done("evaluate")
    x, rows = rows_of(parts["test"], 16), {1: 256, 32: 512, 256: 2048}
    timed(record, trunk.model, x, variants, SIZES, rows)
    timed_as_onnx(record, x, variants, SIZES, rows)


if __name__ == "__main__":
    main("branchy_lenet", __doc__, example)
