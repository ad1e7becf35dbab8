"""Self-speculative generation of a real language model against plain decoding and what transformers offers.

``python -m tests.bench.language --model DIR --text FILE`` takes a local directory of transformers (SmolLM2-135M, say) and
lines of plain text. Light draft heads are fitted on what the model writes after the first words of most lines, and
calibrated on the others; ``--decoder DIR`` keeps them there, or takes a decoder that it finds as it is. Ways take turns.
`speed` is the median of tokens a second over those of `model.generate`, `processor_speed` the same by the process's own
processor time, for a machine that others use and a single thread. Tokens are compared with those of `model.generate`.
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
from torch import Tensor

from eecompile import eecompile, load, strategies
from eecompile.errors import StrategyError
from eecompile.measuring import Bystanders
from tests.bench import machine, record

COUNTED = ("lower", "upper", "full", "drafted", "accepted", "looked_up", "looked_up_accepted", "ties")
COPIED = (0.5, 0.7, 0.9)  # thresholds at which copied keys and values are tried
HELD_OUT, WRITTEN, ROWS = 0.1, 128, 24  # share of lines for calibration; new tokens of a line; lines written at a time
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


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.language", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="local directory of a causal language model")
    parser.add_argument("--text", type=Path, help="lines of plain text")
    parser.add_argument("--decoder", type=Path, help="directory of the fitted and calibrated decoder: made, or taken")
    parser.add_argument("--kinds", nargs="+", choices=[*PROMPTS, "copied", "cache"], default=[*PROMPTS, "copied", "cache"])
    parser.add_argument("--exits", type=int, nargs="+", default=[2, 3, 5], help="blocks of the lower part to fit heads for")
    parser.add_argument("--lines", type=int, default=320, help="lines that are continued for fitting")
    parser.add_argument("--tokens", type=int, default=48, help="new tokens for each prompt")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=1, help="prompts at a time")
    parser.add_argument("--leave-out", nargs="+", default=[], help="ways that are not measured: assistant_early_exit, ...")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=record.RESULTS / "language.json")
    return parser.parse_args()


def command(options: argparse.Namespace) -> str:
    """What makes the figures, with DIR and FILE for what lies on this machine."""
    places = {"model": "DIR", "text": "FILE", "decoder": "DIR"}
    said = [(name, places.get(name, value)) for name, value in vars(options).items() if value and name != "out"]
    words = ["python -m tests.bench.language"]
    for name, value in said:
        words += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
    return " ".join(words)


def main() -> None:
    options = parse()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(options.threads)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    fast, projected = decoder(model, tokenizer, options)
    before = json.loads(options.out.read_text()) if options.out.exists() else {}
    made = before.setdefault(f"{options.model.name}, batch {options.batch}", {})
    made |= {
        "command": command(options),
        "parameters": sum(p.numel() for p in model.parameters()),
        "draft_tokens": fast.draft_head.vocabulary.numel(),
        "set": {name: getattr(fast, name) for name in ("exit", "threshold", "max_draft", "widths")},
        "machine": machine.facts(torch.device("cpu")),
    }
    if projected is not None:
        made["projection"] = projected.to_dict()
    every = [b for texts in PROMPTS.values() for b in batches(tokenizer, texts, 1)]
    for kind in options.kinds:
        if kind in PROMPTS:
            made[kind] = measured(fast, batches(tokenizer, PROMPTS[kind], options.batch), options)
        elif kind == "cache":
            made[kind] = cache(fast, every[0], options.tokens)
        else:
            made[kind] = {str(t): copied(fast, every, t, options.tokens) for t in COPIED}
        print(kind, json.dumps(made[kind], indent=1))
    options.out.write_text(json.dumps(before, indent=1) + "\n")


def decoder(model: Any, tokenizer: Any, options: argparse.Namespace) -> tuple[Any, Any]:
    """A decoder with fitted draft heads, and the report of its calibration where it was made here."""
    if options.decoder is not None and options.decoder.exists():
        return load(options.decoder), None
    if options.text is None:
        raise SystemExit("--text FILE is needed, for fitting and for calibration")
    lines = [line for line in options.text.read_text().splitlines() if len(line.split()) > 8]
    count = max(2, int(HELD_OUT * options.lines))
    held = written(model, tokenizer, lines[:count])
    fast: Any = eecompile(model, strategies.SelfSpeculative(), example_kwargs={"input_ids": held[0][:, :8]})
    texts = written(model, tokenizer, lines[count : count + options.lines])
    for exit in options.exits:
        fast.exit = exit
        print(exit, fast.fit(texts, epochs=8))
    projected = fast.calibrate(held, positions=2000, min_speed=0.0)
    print(projected)
    if options.decoder is not None:
        fast.save(options.decoder)
    return fast, projected


def written(model: Any, tokenizer: Any, lines: list[str]) -> list[Tensor]:
    """What the model writes `[1, S]` after two to eight words of each line, every other batch of lines greedily."""
    found = []
    torch.manual_seed(0)
    for start in range(0, len(lines), ROWS):
        words = [" ".join(line.split()[: 2 + i % 7]) for i, line in enumerate(lines[start : start + ROWS])]
        inputs = tokenizer(words, return_tensors="pt", padding=True, return_token_type_ids=False)
        sampled = {"do_sample": True, "temperature": 0.8} if start // ROWS % 2 else {"do_sample": False}
        out = model.generate(**inputs, **sampled, max_new_tokens=WRITTEN, eos_token_id=None, pad_token_id=0)
        found += [row[None, int(mask.argmax()) :] for row, mask in zip(out, inputs["attention_mask"], strict=True)]
    return found


def batches(tokenizer: Any, texts: list[str], rows: int) -> list[dict[str, Tensor]]:
    return [
        dict(tokenizer(texts[i : i + rows], return_tensors="pt", padding=True, return_token_type_ids=False))
        for i in range(0, len(texts), rows)
    ]


def greedy(tokens: int) -> dict[str, Any]:
    return {"max_new_tokens": tokens, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def measured(fast: Any, inputs: list[dict[str, Tensor]], options: argparse.Namespace) -> dict[str, Any]:
    """Speed of every way over plain decoding on these batches, and whether its tokens are the same."""
    model, settings = fast.model, greedy(options.tokens)
    ways: dict[str, Callable[[Any], Any]] = {
        "plain": lambda x: model.generate(**x, **settings),
        "ours": lambda x: fast.generate(**x, **settings),
    }
    if options.batch == 1:  # those of transformers take one row
        ways["prompt_lookup_num_tokens"] = lambda x: model.generate(**x, prompt_lookup_num_tokens=4, **settings)
        ways["assistant_early_exit"] = lambda x: model.generate(**x, assistant_early_exit=fast.exit, **settings)
    for name in options.leave_out:
        ways.pop(name, None)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    spent: dict[str, list[float]] = {name: [] for name in ways}
    outputs: dict[str, list[Tensor]] = {}
    others = []
    for _ in range(options.rounds):
        watch = Bystanders()
        for name, way in ways.items():
            start, processor = time.perf_counter(), time.process_time()
            try:
                outputs[name] = [way(x) for x in inputs]
            except (ValueError, TypeError, RuntimeError, AttributeError, StrategyError) as e:
                print(f"{name}: {type(e).__name__}: {str(e)[:120]}")
                continue
            seconds[name].append(time.perf_counter() - start)
            spent[name].append(time.process_time() - processor)
        others.append(watch.share())
    rows = sum(len(x["input_ids"]) for x in inputs)
    traces = [fast.run_generate(**x, **settings).to_dict() for x in inputs]
    return {
        "speed": {name: median(seconds["plain"]) / median(s) for name, s in seconds.items() if s},
        "processor_speed": {name: median(spent["plain"]) / median(s) for name, s in spent.items() if s},
        "tokens_per_second": {name: rows * options.tokens / median(s) for name, s in seconds.items() if s},
        "same_texts": {name: f"{same(out, outputs['plain'])} of {rows}" for name, out in outputs.items()},
        "ours": {key: sum(t[key] for t in traces) for key in COUNTED},
        "others": median(o for o in others if o is not None) if None not in others else None,
    }


def same(one: list[Tensor], other: list[Tensor]) -> int:
    return sum(torch.equal(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True))


def copied(fast: Any, inputs: list[dict[str, Tensor]], threshold: float, tokens: int) -> dict[str, float]:
    """How often the text changes where exited tokens skip the upper part (`kv="copy"`)."""
    other: Any = eecompile(fast.model, strategies.SelfSpeculative(kv="copy"), example_kwargs=inputs[0])
    other.draft_heads, other.exit, other.threshold, other.max_draft = fast.draft_heads, fast.exit, threshold, fast.max_draft
    changed, equal, early = 0, 0.0, 0.0
    for x in inputs:
        wanted = fast.generate(**x, **greedy(tokens))[0, -tokens:]
        trace = other.run_generate(**x, **greedy(tokens))
        text = trace.output[0, -tokens:]
        changed += not torch.equal(text, wanted)
        equal += float((text == wanted).float().mean()) / len(inputs)
        early += trace.sources[0].count(1) / tokens / len(inputs)
    return {"texts": len(inputs), "changed": changed, "same_tokens": equal, "tokens_at_the_exit": early}


def cache(fast: Any, inputs: dict[str, Tensor], tokens: int) -> float:
    """Size of the cache over that of plain decoding, after the same text."""

    def size(kept: Any) -> int:
        return sum(t.numel() for layer in kept.layers for t in (layer.keys, layer.values))

    settings = {**greedy(tokens), "return_dict_in_generate": True}
    return size(fast._generated((), {**inputs, **settings})[1].cache) / size(
        fast.model.generate(**inputs, **settings).past_key_values
    )


if __name__ == "__main__":
    main()
