"""A cascade of three readers of IMDB reviews: a bag of words, MiniLM cut to 3 layers, MiniLM with all 6.

Each is trained as usual, the last two from the published encoder. `eecompile` captures them into one graph; only
reviews that one reader is not sure of reach the next. Nothing is trained afterwards: thresholds are chosen on the
validation part, once with a guarantee, once as the cheapest that lose at most 1% there.
"""

from __future__ import annotations

from eecompile import eecompile
from eecompile.strategies import Cascade
from examples import datasets
from examples._common import Options, Record, as_trained, evaluated, main, observed, rows_in, rows_of, timed
from examples.stages import alone, text_stages

ROWS = {"val": 4_000, "test": 4_000}


def example(options: Options, record: Record) -> None:
    """From training to timing."""
    stages = text_stages(quick=options.quick, seed=options.seed)
    record.done("train")
    parts = {
        part: datasets.loader(f"minilm_imdb:{part}", limit=512 if options.quick else rows, standin=options.quick)
        for part, rows in ROWS.items()
    }
    models = {stage.name: stage.model for stage in stages}
    some = next(iter(parts["val"]))
    call = {key: value[:8] for key, value in some.items() if key != "labels"}
    # Three blocks of MiniLM are no better than a bag of words here: "check" would refuse them, and thresholds close them.
    fast = eecompile(models, Cascade(order="given"), example_kwargs=call)
    record.note(
        rows_of_data={part: rows_in(loader) for part, loader in parts.items()},
        tokens=datasets.SEQUENCE,
        flops=fast.program.total_flops,
        models={stage.name: stage.trunk.to_dict() for stage in stages},
        alone=alone(stages, call),
    )
    as_trained(fast, "cascade-text", *(stage.trunk for stage in stages))
    seen = observed(fast, parts)
    last = seen["test"].of(fast).evaluate().full_accuracy
    variants = evaluated(fast, seen, record, f"IMDB, {', '.join(models)}", last)
    record.done("evaluate")
    sizes = {1: 96, 32: 256}
    timed(record, fast.original, rows_of(parts["test"], 8), variants, tuple(sizes), sizes, rounds=7)


if __name__ == "__main__":
    main("cascade_text", __doc__, example)
