"""Saved decoders: what `load` gives is what was saved, and other directories are refused in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from transformers import PreTrainedTokenizerFast

from eecompile import ArtifactError, EecompileError, eecompile, load, strategies
from eecompile.cli.models import saved
from eecompile.language import CompiledDecoder
from tests.cli.shell import call, found
from tests.language.decoders import V, decoder, prompts


def compiled(model: nn.Module, **options: Any) -> Any:
    return eecompile(model, strategies.SelfSpeculative(exit=2, **options), example_kwargs=prompts())


@pytest.mark.parametrize("name", ["llama", "gpt2"])  # untied and tied weights
@pytest.mark.parametrize("rank", [0, 4])
def test_a_loaded_decoder_generates_the_same(tmp_path: Path, name: str, rank: int) -> None:
    model = decoder(name)
    fast = compiled(model, max_draft=3)
    fast.fit([prompts(rows=8, length=20)["input_ids"]], epochs=1, rank=rank)
    fast.exit, fast.threshold, fast.widths, fast.draft_cost = 2, 0.01, (1, 3, 3, 4), 0.0
    fast.save(tmp_path / "saved")
    state = torch.get_rng_state()
    again = load(tmp_path / "saved")
    assert torch.equal(torch.get_rng_state(), state)
    assert isinstance(again, CompiledDecoder) and not again.training
    assert (again.exit, again.threshold, again.max_draft, again.strategy) == (2, 0.01, 3, fast.strategy)
    assert (again.widths, again.draft_cost) == (fast.widths, fast.draft_cost)
    for given in (prompts(), prompts(rows=1, padded=False)):
        one, other = (f.run_generate(**given, max_new_tokens=12, pad_token_id=0) for f in (fast, again))
        assert torch.equal(one.output, other.output)
        assert one.to_dict() == other.to_dict()
        assert torch.equal(other.output, model.generate(**given, max_new_tokens=12, pad_token_id=0))
    fast.save(tmp_path / "saved")  # over the one before
    assert sorted(p.suffix for p in (tmp_path / "saved").iterdir()) == [".json", ".safetensors", ".safetensors"]


def test_methods_of_classifiers_name_those_of_decoders() -> None:
    fast = compiled(decoder("llama"))
    with pytest.raises(EecompileError, match=r"no evaluate\(\)[\s\S]*fast.speculation"):
        fast.evaluate([])
    assert not hasattr(fast, "export") and hasattr(fast, "generate")


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


def test_the_command_line_measures_what_drafting_would_gain(tmp_path: Path) -> None:
    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, V))]
    backend = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="w3"))
    backend.pre_tokenizer = Whitespace()
    model = decoder("llama", dtype=torch.float32)
    model.save_pretrained(tmp_path / "llm")
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path / "llm")  # without a padding token
    (tmp_path / "texts.txt").write_text("\n".join(" ".join(words[3 + i : 12 + 2 * i]) for i in range(6)) + "\n\n")
    compiled(model).save(tmp_path / "saved")
    tokenizer = ("--tokenizer", str(tmp_path / "llm"))
    for args in ((str(tmp_path / "llm"), "--option", "exit=1"), (str(tmp_path / "saved"), *tokenizer)):
        report = found("inspect", *args, "--speculation", "--data", str(tmp_path / "texts.txt"))
        assert [c["exit"] for c in report["candidates"]] == [1, 2, 3]
        assert report["positions"] == sum(9 + i for i in range(6))
    assert "plain decoding takes" in call("inspect", *args, "--speculation", "--data", str(tmp_path / "texts.txt")).stdout
    assert "--data with texts" in call("inspect", str(tmp_path / "llm"), "--speculation", code=2).stderr
