"""Passes of fixed shape give what passes of the needed shape give; recording them as CUDA graphs needs a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from eecompile import eecompile, strategies
from eecompile.language.static import FixedPass, StaticSplit
from tests.language.decoders import DECODERS, decoder, prompts

PADDED = [name for name in DECODERS if name != "gemma2"]  # in float64 its own scores of padded rows are NaN


@pytest.mark.parametrize("name", DECODERS)
def test_the_static_form_gives_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = prompts(padded=name in PADDED)
    options: dict[str, Any] = {"max_new_tokens": 14, "do_sample": False, "return_dict_in_generate": True}
    chosen = strategies.SelfSpeculative(exit=2, threshold=0.0, max_draft=3)
    fast: Any = eecompile(decoder(name), chosen, example_kwargs=batch)
    wanted = fast.run_generate(**batch, **options)
    shapes: set[Any] = set()
    call = FixedPass.__call__

    def watched(self: FixedPass, *inputs: Tensor) -> Tensor:
        before = [t.data_ptr() for t in self.inputs]
        output = call(self, *inputs)
        assert before == [t.data_ptr() for t in self.inputs], "a replay reads the same addresses"
        shapes.add((len(inputs), *(tuple(t.shape) for t in inputs[:2])))
        return output

    monkeypatch.setattr(FixedPass, "__call__", watched)
    got = fast.run_generate(**batch, **options, cache_implementation="static")
    assert torch.equal(got.output.sequences, wanted.output.sequences)
    assert got.sources == wanted.sources and got.counts == wanted.counts
    assert shapes == {(n, (3, w), (3, w)) for n in (3, 4) for w in (1, 4)} & shapes and len(shapes) >= 2
    for mine, theirs in zip(got.output.past_key_values.layers, wanted.output.past_key_values.layers, strict=True):
        torch.testing.assert_close(mine.keys, theirs.keys, atol=1e-6, rtol=1e-6)


def test_the_cache_of_the_static_form_stays_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    fast: Any = eecompile(decoder("llama"), strategies.SelfSpeculative(exit=2, threshold=0.0), example_kwargs=prompts())
    at: dict[int, set[int]] = {0: set(), 3: set()}
    upper = StaticSplit.upper

    def watched(self: StaticSplit, ids: Tensor, hidden: Tensor, slots: Any, cache: Any) -> Tensor:
        output = upper(self, ids, hidden, slots, cache)
        for layer in at:
            at[layer].add(cache.layers[layer].keys.data_ptr())
        return output

    monkeypatch.setattr(StaticSplit, "upper", watched)
    fast.generate(**prompts(), max_new_tokens=40, do_sample=False, eos_token_id=None, cache_implementation="static")
    assert all(len(places) == 1 for places in at.values())
