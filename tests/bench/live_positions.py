"""What computing live positions only gains on BERT-base, 8 x 128: `python -m tests.bench.live_positions`.

All positions take the first block, then a given share of them goes on to the end: random weights, the units set by hand.
Three calls in turn, median of seven rounds, two threads: the program, the same with every position of a live row computed,
and the original. The ideal is the cost of the rows in FLOPs.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification

from eecompile import eecompile, strategies
from eecompile.benchmark import interleaved, summary
from eecompile.runtime.compact import CompactExecutor


def halting_behind_the_first(fast: Any, kwargs: dict[str, torch.Tensor], share: float) -> None:
    """Sets the units so that this share of the positions goes on to the last block."""
    first, *others = (fast.program.marked.get_submodule(s.unit) for s in fast.program.halts[0].steps)
    seen: list[torch.Tensor] = []
    hook = first.score.register_forward_hook(lambda _, __, output: seen.append(output.flatten()))
    with torch.no_grad():
        weight = torch.randn(first.score.weight.shape, generator=torch.Generator().manual_seed(1))
        first.score.weight.copy_(100 * weight)  # scores of 0 and 1
        first.score.bias.zero_()
        for unit in others:
            unit.score.weight.zero_()
            unit.score.bias.fill_(-20.0)
        fast.executor = "reference"
        fast(**kwargs)
        fast.executor = "compact"
        ranked = seen[0].sort().values
        cut = ranked[int(share * len(ranked))] if share < 1 else ranked[-1] + 1
        first.score.bias.fill_(-float(cut))
    hook.remove()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.live_positions", description=__doc__)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": options.layers, "num_attention_heads": options.width // 64}
    config = BertConfig(hidden_size=options.width, intermediate_size=4 * options.width, **sizes)
    model = BertForSequenceClassification(config).eval()
    kwargs = {"input_ids": torch.randint(0, 30_000, (8, 128)), "attention_mask": torch.ones(8, 128, dtype=torch.long)}
    fast = eecompile(model, strategies.Act(per_token=True), example_kwargs=kwargs)
    halts = tuple(replace(h, steps=tuple(replace(s, parts=()) for s in h.steps)) for h in fast.program.halts)
    live, every = CompactExecutor(fast.program), CompactExecutor(fast.program.replace(halts=halts))
    flat = fast.program.signature.flatten((), kwargs)
    calls = {
        "live": lambda: live.run(flat, fast.settings),
        "every": lambda: every.run(flat, fast.settings),
        "original": lambda: model(**kwargs),
    }
    with torch.no_grad():
        for share in (1.0, 0.5, 0.25):
            halting_behind_the_first(fast, kwargs, share)
            cost = float(fast.run(**kwargs).cost.mean())
            found = {name: summary(t) for name, t in interleaved(calls, 7, warm_up=1).items()}
            median = found["live"][0]
            line = ", ".join(f"{name} {1e3 * t:.0f} +- {1e3 * spread:.0f} ms" for name, (t, spread) in found.items())
            gains = [f"{found[rival][0] / median:.2f}x against {rival}" for rival in ("every", "original")]
            print(f"{share:.0%} live: {line}; {', '.join(gains)}, ideal {1 / cost:.2f}x", flush=True)


if __name__ == "__main__":
    main()
