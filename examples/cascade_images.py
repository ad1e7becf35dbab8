"""A cascade of three convolutional networks on CIFAR-10: a tiny one at 16 x 16, ResNet-8 and ResNet-20.

Each is trained as usual. `eecompile` captures them into one graph, input preparation and all; only images that one
network is not sure of reach the next. Nothing is trained afterwards: thresholds are chosen on the validation part, once
with a guarantee, once as the cheapest that lose at most 1% there.
"""

from __future__ import annotations

from eecompile import eecompile
from eecompile.strategies import Cascade
from examples import datasets
from examples._common import Options, Record, as_trained, evaluated, main, observed, rows_in, rows_of, timed
from examples.stages import alone, image_stages


def example(options: Options, record: Record) -> None:
    """From training to timing."""
    stages = image_stages(quick=options.quick, seed=options.seed)
    record.done("train")
    parts = {part: datasets.loader(f"cifar10:{part}", standin=options.quick, batch_size=64) for part in ("val", "test")}
    models = {stage.name: stage.model for stage in stages}
    x = next(iter(parts["val"]))[0][:8]
    order = "given" if options.quick else "check"  # the stand-in cannot tell which of three good models is the best
    cascade = Cascade(prepare=[stage.prepare for stage in stages], order=order)
    fast = eecompile(models, cascade, example_inputs=(x,))
    record.note(
        rows_of_data={part: rows_in(loader) for part, loader in parts.items()},
        flops=fast.program.total_flops,
        models={stage.name: stage.trunk.to_dict() for stage in stages},
        alone=alone(stages, x),
    )
    as_trained(fast, "cascade-images", *(stage.trunk for stage in stages))
    seen = observed(fast, parts)
    last = seen["test"].of(fast).evaluate().full_accuracy
    variants = evaluated(fast, seen, record, f"CIFAR-10, {', '.join(models)}", last)
    record.done("evaluate")
    sizes = {1: 32, 32: 96, 256: 256}
    timed(record, fast.original, rows_of(parts["test"], 4), variants, tuple(sizes), sizes, rounds=7)


if __name__ == "__main__":
    main("cascade_images", __doc__, example)
