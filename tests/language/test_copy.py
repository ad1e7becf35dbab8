"""`kv="copy"`: exited tokens skip the upper part; compared with a definition without a cache, token by token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from eecompile import EecompileError, StrategyError, eecompile, strategies
from eecompile.language.split import find_block_list
from tests.language.decoders import DECODERS, decoder, prompts

EXIT, MOST, NEW = 2, 3, 10
GREEDY = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
PADDED = [name for name in DECODERS if name != "gemma2"]  # in float64 its own scores of padded rows are NaN


def compiled(model: Any, padded: bool = True, **options: Any) -> Any:
    chosen = strategies.SelfSpeculative(**{"exit": EXIT, "max_draft": MOST, "kv": "copy", **options})
    return eecompile(model, chosen, example_kwargs=prompts(padded=padded))


def defined(model: Any, head: Any, ids: Tensor, threshold: float) -> tuple[list[int], list[bool]]:
    """New tokens of one row without padding, and which of them its exit gave.

    The whole text runs through the model for each token; where an earlier token has exited, every upper block reads the
    hidden state at the exit.
    """
    blocks = model.get_submodule(find_block_list(model))
    text, exited, early = ids.tolist(), torch.zeros(len(ids) + NEW, dtype=torch.bool), []
    at_exit: list[Tensor] = []

    def replaced(module: Any, args: Any) -> Any:
        if module is blocks[EXIT]:
            at_exit[:] = [args[0]]
        skips = exited[: args[0].shape[1], None]
        return torch.where(skips, at_exit[0], args[0]), *args[1:]

    hooks = [block.register_forward_pre_hook(replaced) for block in blocks[EXIT:]]
    try:
        for _ in range(NEW):
            logits = model(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1]
            sure, best = head(at_exit[0][0, -1].float()).softmax(-1).max(-1)
            last = len(text) - 1
            exits = len(early) > 0 and not all(early[-MOST:] + [False] * (len(early) < MOST))
            exits = exits and float(sure) >= threshold
            exited[last] = exits
            text.append(int(head.vocabulary[best]) if exits else int(logits.argmax()))
            early.append(exits)
    finally:
        for hook in hooks:
            hook.remove()
    return text[len(ids) :], early


@pytest.mark.parametrize("name", DECODERS)
def test_the_text_is_that_of_the_definition(name: str) -> None:
    model, batch = decoder(name), prompts(padded=name in PADDED)
    fast = compiled(model, name in PADDED)
    fast.fit([prompts(8, 20)["input_ids"].clamp(min=3)], epochs=2, rank=0)
    fast.threshold = 0.03
    trace = fast.run_generate(**batch, **GREEDY)
    assert trace.counts.accepted > 0
    for b, real in enumerate(batch["attention_mask"].bool()):
        tokens, early = defined(model, fast.draft_head, batch["input_ids"][b][real], fast.threshold)
        assert trace.output[b, -NEW:].tolist() == tokens
        assert [source == 1 for source in trace.sources[b]] == early


def test_with_exits_closed_the_text_is_the_models() -> None:
    model = decoder("llama")
    fast = compiled(model, threshold=2.0)
    assert torch.equal(fast.generate(**prompts(), **GREEDY), model.generate(**prompts(), **GREEDY))


def test_kept_drafts_follow_the_logits_processors() -> None:
    for kv in ("copy", "deferred"):
        fast = compiled(decoder("llama"), threshold=0.0, kv=kv)
        free = fast.generate(**prompts(), **GREEDY)[:, 9:]
        banned = [[int(t)] for t in free[:, 1:].unique()]
        got = fast.run_generate(**prompts(), **GREEDY, bad_words_ids=banned)
        assert got.counts.accepted > 0
        assert not torch.isin(got.output[:, 9:], torch.tensor(banned)).any()


def test_calibration_bounds_what_a_sequence_loses() -> None:
    fast = compiled(decoder("llama"))
    batches = [prompts(8, 9, seed) for seed in range(3)]
    report = fast.calibrate(batches, max_drop=0.99, delta=None, max_new_tokens=6, thresholds=(0.0, 0.9))
    losses = {t["threshold"]: t["loss"] for t in report.tried}
    assert report.qualified and fast.threshold == 0.0 and losses[0.0] > losses[0.9] == 0


def test_what_has_no_meaning_is_refused() -> None:
    fast = compiled(decoder("llama"))
    for asked in ("output_scores", "output_logits"):
        with pytest.raises(StrategyError, match="copy"):
            fast.generate(**prompts(), **GREEDY, return_dict_in_generate=True, **{asked: True})
    for kv in ("copy", "deferred"):
        with pytest.raises(StrategyError, match="must be verified"):
            strategies.SelfSpeculative(kv=kv, lookup=3)
        assert strategies.SelfSpeculative(kv=kv).longest_lookup == 0
    with pytest.raises(EecompileError, match="deferred"):
        strategies.SelfSpeculative(kv="defered")
