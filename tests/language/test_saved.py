"""Saved decoders: what `load` gives is what was saved, and other directories are refused in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from eecompile import ArtifactError, EecompileError, eecompile, load, strategies
from eecompile.cli.models import saved
from eecompile.language import CompiledDecoder
from tests.language.decoders import decoder, prompts


def compiled(model: nn.Module, **options: Any) -> Any:
    return eecompile(model, strategies.SelfSpeculative(exit=2, **options), example_kwargs=prompts())


@pytest.mark.parametrize("name", ["llama", "gpt2"])  # untied and tied weights
@pytest.mark.parametrize("rank", [0, 4])
def test_a_loaded_decoder_generates_the_same(tmp_path: Path, name: str, rank: int) -> None:
    model = decoder(name)
    fast = compiled(model, max_draft=3)
    fast.fit([prompts(rows=8, length=20)["input_ids"]], epochs=1, rank=rank)
    fast.exit, fast.threshold = 2, 0.01
    fast.save(tmp_path / "saved")
    state = torch.get_rng_state()
    again = load(tmp_path / "saved")
    assert torch.equal(torch.get_rng_state(), state)
    assert isinstance(again, CompiledDecoder) and not again.training
    assert (again.exit, again.threshold, again.max_draft, again.strategy) == (2, 0.01, 3, fast.strategy)
    for given in (prompts(), prompts(rows=1, padded=False)):
        one, other = (f.run_generate(**given, max_new_tokens=12, pad_token_id=0) for f in (fast, again))
        assert torch.equal(one.output, other.output)
        assert one.to_dict() == other.to_dict()
        assert torch.equal(other.output, model.generate(**given, max_new_tokens=12, pad_token_id=0))
    fast.save(tmp_path / "saved")  # over the one before
    assert sorted(p.suffix for p in (tmp_path / "saved").iterdir()) == [".json", ".safetensors", ".safetensors"]


def test_what_cannot_be_saved_or_loaded_is_said(tmp_path: Path) -> None:
    fast = compiled(decoder("llama"))

    class Mine(type(fast.model)):  # type: ignore[misc]
        pass

    fast.model.__class__ = Mine
    with pytest.raises(ArtifactError, match="only models whose class is one of transformers"):
        fast.save(tmp_path / "mine")
    assert not (tmp_path / "mine").exists()
    fast.model.__class__ = Mine.__mro__[1]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="the directory holds something else"):
        fast.save(tmp_path / "full")
    fast.save(tmp_path / "saved")
    with pytest.raises(EecompileError, match="this is a saved decoder"):
        saved(tmp_path / "saved")
    with pytest.raises(EecompileError, match="a decoder has no executor"):
        load(tmp_path / "saved", executor="compact")
    weights = next((tmp_path / "saved").glob("weights-*"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(ArtifactError, match="altered"):
        load(tmp_path / "saved")
