"""Embeddings by a causal decoder whose caller chooses the exit of each request, rows padded on the left."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from eecompile import eecompile, strategies
from eecompile.serving import RowServer
from tests.language.decoders import decoder, prompts


class Embedder(nn.Module):
    """The last token's hidden state `[B, D]`, of length 1."""

    def __init__(self) -> None:
        super().__init__()
        self.body = decoder("llama", dtype=torch.float32).model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
        states = self.body(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=positions, use_cache=False
        ).last_hidden_state
        return functional.normalize(states[:, -1], dim=-1)


def distance(early: Tensor, full: Tensor) -> Tensor:
    return 1 - functional.cosine_similarity(early, full, dim=-1).mean()


@pytest.fixture(scope="module")
def fast() -> Any:
    model = Embedder().eval()
    found: Any = eecompile(model, strategies.Anytime(), example_kwargs=prompts(4))
    with torch.no_grad():
        batches = [(prompts(8, 9, seed), model(**prompts(8, 9, seed))) for seed in range(4)]
    found.fit(batches, epochs=1, loss=distance)
    found.set_thresholds(1.0)  # open, and left by no row of itself
    return found


def test_each_call_chooses_its_exit(fast: Any) -> None:
    batch = prompts(4, 9, 7)
    costs = fast.cost_model.at_exits(fast.settings)
    assert len(costs) == 4
    every = fast.observe(**batch).outputs
    for exit, cost in enumerate(costs):
        found = fast.run(**batch, budget=cost)
        assert found.exit_index.tolist() == [exit] * 4
        torch.testing.assert_close(found.output, every[exit])
        for b, real in enumerate(batch["attention_mask"].bool()):
            alone = {name: t[b][real][None] for name, t in batch.items()}
            torch.testing.assert_close(fast(**alone, budget=cost)[0], found.output[b], atol=1e-5, rtol=1e-4)


def test_each_request_of_a_server_chooses_its_exit(fast: Any) -> None:
    batch = prompts(4, 9, 7)
    costs = fast.cost_model.at_exits(fast.settings)
    with RowServer(fast, max_batch=4, max_wait_ms=50) as server:
        waiting = [server.submit(**{n: t[b : b + 1] for n, t in batch.items()}, budget=cost) for b, cost in enumerate(costs)]
        answers = [w.result(timeout=60) for w in waiting]
    assert [int(a.exit_index) for a in answers] == [0, 1, 2, 3]
