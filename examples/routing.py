"""Dynamic routing: ResNet-20 on CIFAR-10, with a router after its first stage that estimates how hard an image is.

To a light version: easy images skip every block of the last two stages that can be skipped, in a copy of those stages
that is fine-tuned for it; the others take the model's own way, whose weights never change. To exits: each image is sent
straight to one of three answers, and only that one's head is computed for it. Rows are grouped by route.

An epoch is a fresh draw of rows from the training part, so that training takes minutes. Whether the router knows easy
rows from hard ones is seen by comparing with a router that knows nothing: `by_chance` is what sending as many rows to
each route at random would reach on the same rows, `random` what the best mixture of two routes at the same cost would.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader

from eecompile import CompiledModule, eecompile
from eecompile.strategies import Branchy, Router
from examples._common import Options, Record, Variant, accuracy, fitted, main, resnet_trunk, rows_in, rows_of, timed
from examples._constant import Constant, alternatives
from examples._parts import cifar_parts
from examples.branchy_resnet import Branch

ROWS, ROWS_QUICK = 6400, 96  # of an epoch
HELD_OUT = {"val": 4000, "test": 4000}
SIZES = (1, 64)
MOST_LOST = 0.02
AT, END, EXITS = "stage1.2", "stage3.2", ("stage2.0", "stage3.0")
AT_QUICK, END_QUICK, EXITS_QUICK = "stage1", "stage3", ("stage2",)  # of ResNet-8, one block a stage
EPOCHS = {"light": 20, "exits": 12}


def strategies(quick: bool) -> dict[str, Branchy]:
    """The two ways to route, by what the router sends rows to."""
    at, end, exits = (AT_QUICK, END_QUICK, EXITS_QUICK) if quick else (AT, END, EXITS)
    # ResNet-8 has no block to leave out after its first stage: there the branches begin at the input
    light = {"at": "input", "over": ("input", end), "unit": "linear"} if quick else {"at": at}
    branches = Router(to={"light": 0.01}, price=0.3, target_cost=0.8, warm_up=0.5, **light)  # type: ignore[arg-type]
    return {
        "light": Branchy(router=branches),
        "exits": Branchy(exits=exits, head=Branch, router=Router(at=at, to="exits", price=1.0)),
    }


def example(options: Options, record: Record) -> None:
    """From training to timing."""
    quick = options.quick
    trunk = resnet_trunk(quick=quick, seed=options.seed)
    train, held_out = cifar_parts(ROWS_QUICK if quick else ROWS, HELD_OUT, quick=quick, seed=options.seed)
    x: Tensor = next(iter(held_out["val"]))[0][:8]
    programs: dict[str, CompiledModule] = {}
    fits: dict[str, Any] = {}
    for name, strategy in strategies(quick).items():
        fast = programs[name] = eecompile(trunk.model, strategy, example_inputs=(x,))
        epochs = 2 if quick else EPOCHS[name]
        fits[name] = fitted(
            fast, train, f"routing-{name}", options, trunk, epochs=epochs, lr=3e-3, scheduler="cosine", bf16=not quick
        )
    sizes = {"train": rows_in(train)} | {part: rows_in(loader) for part, loader in held_out.items()}
    model = f"{type(trunk.model).__name__}, {sum(p.numel() for p in trunk.model.parameters()):,} parameters"
    record.note(data="CIFAR-10", rows_of_data=sizes, model=model, trunk=trunk.to_dict(), fit=fits)
    record.done("train")
    original = accuracy(trunk.model, held_out["test"])
    test, promise = held_out["test"], f"at most {MOST_LOST:.0%} lost, guaranteed"
    variants, reports = [], {}
    for name, fast in programs.items():
        variants.append(evaluated(fast, test, record, name, "as trained", original))
        reports[name] = fast.calibrate(held_out["val"], max_drop=MOST_LOST).to_dict()
        variants.append(evaluated(fast, test, record, name, promise, original))
    record.note(calibration=reports)
    record.done("evaluate")
    timed(record, trunk.model, rows_of(held_out["test"], 2), variants, SIZES)


def evaluated(
    fast: CompiledModule, test: DataLoader[Any], record: Record, name: str, how: str, original_accuracy: float
) -> Variant:
    """A line of the record for where the router sends rows as it is set now."""
    judgement = fast.evaluate(test)
    points = constants(fast, test)
    row = record.row(
        f"CIFAR-10, ResNet-20, router to {'a light version' if name == 'light' else 'exits'}",
        thresholds=how,
        original_accuracy=original_accuracy,
        full_accuracy=judgement.full_accuracy,
        accuracy=judgement.accuracy,
        cost=judgement.mean_cost,
        share={r.name: r.share for r in judgement.routes},
        by_chance=sum(r.share * accuracy for r, (_, _, accuracy) in zip(judgement.routes, points, strict=True)),
        **alternatives(points, judgement.mean_cost),
        evaluation=judgement.to_dict(),
    )
    thresholds, margins = fast.thresholds.tolist(), fast.route_margins.tolist()

    def before() -> None:
        fast.set_thresholds(thresholds)
        if margins:
            fast.set_route_margins(margins)

    return Variant(row, fast, before)


def constants(fast: CompiledModule, loader: DataLoader[Any]) -> list[Constant]:
    """All rows on one route, for each, the router's own cost included."""
    if fast.exits:
        return [(row.name, row.cost, float(row.accuracy_if_all or 0.0)) for row in fast.evaluate(loader).rows]
    found = []
    before = fast.route_margins.tolist()
    for name in (r.name for r in fast.routes):
        fast.set_route_margins([0.0 if r.name == name else 2.0 for r in fast.routes])
        report = fast.evaluate(loader)
        found.append((name, report.mean_cost, float(report.accuracy or 0.0)))
    fast.set_route_margins(before)
    return found


if __name__ == "__main__":
    main("routing", __doc__, example)
