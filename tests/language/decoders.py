"""Small causal language models with random weights, one of each architecture."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers as hf
from torch import Tensor, nn

V = 64
SPECIAL: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    **SPECIAL,
}
GROUPED: dict[str, Any] = {**SIZES, "num_key_value_heads": 2}
DECODERS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**GROUPED)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**GROUPED, head_dim=8)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**GROUPED, sliding_window=6)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**GROUPED, head_dim=8, sliding_window=6)),
    "gemma3": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**GROUPED, head_dim=8, sliding_window=6)),
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=V, n_embd=32, n_layer=4, n_head=4, n_positions=128, **SPECIAL)
    ),
    "gpt_neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**SIZES)),
    "opt": lambda: hf.OPTForCausalLM(
        hf.OPTConfig(
            vocab_size=V, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, ffn_dim=48, word_embed_proj_dim=32,
            max_position_embeddings=128, **SPECIAL,
        )
    ),
    "phi": lambda: hf.PhiForCausalLM(hf.PhiConfig(**SIZES)),
}  # fmt: skip


def decoder(name: str, seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DECODERS[name]().to(dtype).eval()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p) * 0.05)
    return model


def prompts(rows: int = 3, length: int = 9, seed: int = 1, padded: bool = True) -> dict[str, Tensor]:
    """Token ids and mask, the rows padded on the left by different amounts."""
    ids = torch.randint(3, V, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    if padded:
        for b in range(rows):
            mask[b, : (3 * b) % (length - 2)] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}
