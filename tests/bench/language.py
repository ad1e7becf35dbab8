"""Self-speculative generation of a real language model against plain decoding and what transformers offers.

``python -m tests.bench.language --model DIR`` takes a local directory of transformers (SmolLM2-135M, say). Rounds are
interleaved; a figure is the median of tokens a second over those of `model.generate`. Tokens are compared with it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from eecompile import eecompile, strategies
from eecompile.errors import StrategyError
from tests.bench import machine, record

COUNTED = ("lower", "upper", "drafted", "accepted", "looked_up_accepted", "ties")
PROMPTS = {
    "continuation": [
        "The history of the city begins in the twelfth century, when a small settlement near the river",
        "When the rain finally stopped, the children ran out into the garden and found",
        "Photosynthesis is the process by which plants",
        "The main difference between a virus and a bacterium is that",
    ],
    "list": [
        "Here is a list of ten European countries and their capitals:\n1. France: Paris\n2. Germany: Berlin\n3.",
        "Months of the year: January, February, March,",
        "Planets of the solar system, from the sun outwards:\n1. Mercury\n2.",
        "The first twenty square numbers are 1, 4, 9, 16,",
    ],
    "copy": [
        "Repeat the sentence three times.\nThe quick brown fox jumps over the lazy dog.\nThe quick brown fox jumps over",
        "def add(a, b):\n    return a + b\n\ndef subtract(a, b):\n    return a - b\n\ndef multiply(a, b):\n    return",
        "name: Anna, age: 31, city: Bern\nname: Anna, age: 32, city: Bern\nname: Anna, age: 33,",
        "Text: Water boils at 100 degrees. Summary: Water boils at 100 degrees. Text: Ice melts at 0 degrees. Summary:",
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.language", description=__doc__)
    parser.add_argument("--model", required=True, help="local directory of a causal language model")
    parser.add_argument("--tokens", type=int, default=48, help="new tokens for each prompt")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--fit", action="store_true", help="train a light draft head on the model's own text first")
    parser.add_argument("--out", type=Path, default=record.RESULTS / "language.json")
    options = parser.parse_args()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(2)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    prompts = {kind: [tokenizer(p, return_tensors="pt")["input_ids"] for p in texts] for kind, texts in PROMPTS.items()}
    settings: dict[str, Any] = {
        "max_new_tokens": options.tokens,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    # The model's own text, from other prompts than those timed: what it is calibrated on.
    starts = [
        tokenizer(p.split()[0] + " " + p.split()[1], return_tensors="pt")["input_ids"] for t in PROMPTS.values() for p in t
    ]
    texts = [model.generate(s, **{**settings, "max_new_tokens": 80}) for s in starts]
    fast: Any = eecompile(model, strategies.SelfSpeculative(), example_kwargs={"input_ids": prompts["list"][0]})
    fitted = fast.fit(texts, epochs=20).to_dict() if options.fit else None
    projected = fast.calibrate(texts, positions=300, min_speed=0.0)
    print(projected)
    ways: dict[str, Callable[[Any], Any]] = {
        "plain": lambda x: model.generate(x, **settings),
        "ours": lambda x: fast.generate(x, **settings),
        "prompt_lookup_num_tokens": lambda x: model.generate(x, prompt_lookup_num_tokens=4, **settings),
        "assistant_early_exit": lambda x: model.generate(x, assistant_early_exit=fast.exit, **settings),
    }
    found: dict[str, Any] = {}
    for kind, inputs in prompts.items():
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        same = dict.fromkeys(ways, 0)
        wanted = [ways["plain"](x) for x in inputs]
        for _ in range(options.rounds):
            for name, way in ways.items():
                start = time.perf_counter()
                try:
                    outputs = [way(x) for x in inputs]
                except (ValueError, TypeError, RuntimeError, AttributeError, StrategyError) as e:
                    same[name] = -1
                    print(f"{name}: {type(e).__name__}: {str(e)[:120]}")
                    continue
                seconds[name].append(time.perf_counter() - start)
                same[name] = sum(torch.equal(a, b) for a, b in zip(outputs, wanted, strict=True))
        traces = [fast.run_generate(x, **settings).to_dict() for x in inputs]
        base = median(seconds["plain"])
        found[kind] = {
            "speed": {name: base / median(s) for name, s in seconds.items() if s},
            "same": {name: f"{n} of {len(inputs)}" for name, n in same.items() if n >= 0},
            "ours": {
                key: sum(t[key] for t in traces)
                for key in ("lower", "upper", "drafted", "accepted", "looked_up_accepted", "ties")
            },
        }
        print(kind, json.dumps(found[kind]))
    options.out.write_text(
        json.dumps(
            {
                "command": f"python -m tests.bench.language --model DIR{' --fit' if options.fit else ''}",
                "model": type(model).__name__,
                "parameters": sum(p.numel() for p in model.parameters()),
                "tokens": options.tokens,
                "rounds": options.rounds,
                "fit": fitted,
                "projection": projected.to_dict(),
                "results": found,
                "machine": machine.facts(torch.device("cpu")),
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
