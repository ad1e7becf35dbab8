"""B-LeNet (Teerapittayanon et al. 2016): LeNet with branches behind its first two convolutions, MNIST and Fashion-MNIST.

The model is trained as usual, then compiled, then trained on with its branches, all losses together. Thresholds are
chosen on the validation part: once with a guarantee, once as the cheapest that lose at most 1% there; for both branches,
and for the first alone, as in the paper: on a model this small a decision costs time that its FLOPs do not show.
"""

from __future__ import annotations

from eecompile import eecompile
from eecompile.strategies import Branchy
from examples import datasets
from examples._common import Options, Record, fitted, judged, lenet_trunk, main, observed, rows_in, rows_of, timed

EXITS = ("relu", "relu_1")  # behind the first and the second convolution
SETS = {"mnist": "MNIST", "fashion_mnist": "Fashion-MNIST"}
SIZES = (1, 32, 256)


def example(options: Options, record: Record) -> None:
    """Both data sets, from training to timing."""
    quick = options.quick
    compiled, first, trunks, loaders = {}, {}, {}, {}
    for name in SETS:
        trunk = trunks[name] = lenet_trunk(name, quick=quick, seed=options.seed)
        parts = loaders[name] = {
            part: datasets.loader(f"{name}:{part}", standin=quick, seed=options.seed) for part in datasets.PARTS
        }
        x = next(iter(parts["val"]))[0][:8]
        fast = compiled[name] = eecompile(trunk.model, Branchy(exits=EXITS, trunk=True), example_inputs=(x,))
        fit = fitted(
            fast,
            parts["train"],
            f"branchy-lenet-{name}",
            options,
            trunk,
            epochs=2 if quick else 6,
            lr=4e-3,
            trunk_lr=1e-3,
            scheduler="cosine",
        )
        alone = first[name] = eecompile(trunk.model, Branchy(exits=EXITS[:1], trunk=True), example_inputs=(x,))
        alone.branch("exit_0").load_state_dict(fast.branch("exit_0").state_dict())
        sizes = {part: rows_in(loader) for part, loader in parts.items()}
        record.note(**{name: {"rows": sizes, "model": "LeNet", "trunk": trunk.to_dict(), "fit": fit}})
    record.done("train")
    variants = {}
    for name, label in SETS.items():
        held_out = {part: loaders[name][part] for part in ("val", "test")}
        seen = observed(compiled[name], held_out)
        of_first = {part: everything.only(0) for part, everything in seen.items()}
        variants[name] = [
            *judged(compiled[name], seen, record, f"{label}, LeNet, 2 exits", trunks[name].accuracy),
            *judged(first[name], of_first, record, f"{label}, LeNet, 1 exit", trunks[name].accuracy),
        ]
    record.done("judge")
    for name in SETS:
        x = rows_of(loaders[name]["test"], 16)
        timed(record, trunks[name].model, x, variants[name], SIZES, {1: 256, 32: 512, 256: 2048})


if __name__ == "__main__":
    main("branchy_lenet", __doc__, example)
