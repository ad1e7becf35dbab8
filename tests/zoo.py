"""37 unmodified models with tiny random weights: 27 of transformers, built from their configurations, and 10 plain ones.

`ZOO[name]` says how to build a model, how to make inputs for it, and what is special about it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import transformers as hf
from torch import Generator, Tensor, nn

from tests import zoo_plain as plain
from tests.zoo_plain import VOCABULARY, WIDTH

LENGTH = 12
Inputs = dict[str, Any] | tuple[Tensor, ...]
MakeInputs = Callable[[int, Generator], Inputs]


@dataclass(frozen=True)
class Entry:
    """One model.

    Attributes:
        build: Makes it; weights come from the global generator, which `model()` seeds.
        make_inputs: `(batch, generator)` to the inputs of one call.
        exact: Whether the captured graph gives the model's numbers bit for bit; else within 1e-6.
        blocks: Number of repeated units that find_blocks finds; 0 for models without.
        exits: Where the exits go.
        constants: Keyword arguments that are burned in.
        options: Further options of `eecompile`.
    """

    name: str
    build: Callable[[], nn.Module]
    make_inputs: MakeInputs
    exact: bool = True
    blocks: int = 4
    exits: int | tuple[str, ...] = 3
    constants: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    def model(self, seed: int = 0) -> nn.Module:
        """The model in eval mode; the global generator is left as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.build().eval()
            with torch.no_grad():
                for p in model.parameters():  # zero-initialised biases would hide mistakes
                    p.add_(torch.randn_like(p) * 0.05)
                self._set_batch_statistics(model)
        return model

    def _set_batch_statistics(self, model: nn.Module) -> None:
        """Batch norms as after training: with a mean of 0 and a variance of 1 a deep net says the same of every row."""
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        if not norms:
            return
        momentum = [m.momentum for m in norms]
        for m in norms:
            m.train()
            m.momentum = 1.0
        args, kwargs = self.inputs(8, seed=9)
        model(*args, **kwargs)
        for m, before in zip(norms, momentum, strict=True):
            m.eval()
            m.momentum = before

    def inputs(self, batch: int, seed: int = 0) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        """Positional and keyword arguments of a call with `batch` rows."""
        made = self.make_inputs(batch, torch.Generator().manual_seed(1000 * seed + batch))
        return ((), {**made, **self.constants}) if isinstance(made, dict) else (made, dict(self.constants))


ZOO: dict[str, Entry] = {}
# For `make test`; the others are nightly: text with a mask, a causal model, encoder and decoder, an output by name,
# convolutions with batch norm, recurrence in one operator, exits of its own, the sequence first, and no blocks at all.
OFTEN = {"bert", "gpt2_lm", "t5", "clip_vision", "hf_resnet", "lstm", "msdnet", "nn_encoder_sf", "lenet"}


def register(make_inputs: MakeInputs, **about: Any) -> Callable[[Callable[[], nn.Module]], Any]:
    def add(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        ZOO[build.__name__] = Entry(build.__name__, build, make_inputs, **about)
        return build

    return add


# ---------------------------------------------------------------------------------------- inputs


def ids(batch: int, g: Generator, length: int = LENGTH) -> Tensor:
    return torch.randint(5, VOCABULARY, (batch, length), generator=g)


def tokens(batch: int, g: Generator) -> Inputs:
    return (ids(batch, g),)


def text(batch: int, g: Generator) -> Inputs:
    """Rows of unequal length, padded on the right."""
    mask = torch.ones(batch, LENGTH, dtype=torch.long)
    for i in range(batch):
        mask[i, LENGTH - i % 4 :] = 0
    return {"input_ids": ids(batch, g), "attention_mask": mask}


def text_pair(batch: int, g: Generator) -> Inputs:
    made = text(batch, g)
    assert isinstance(made, dict)
    return {**made, "decoder_input_ids": ids(batch, g, 7)}


def token_ids(batch: int, g: Generator) -> Inputs:
    return {"input_ids": ids(batch, g)}


def pixels(channels: int = 3, side: int = 32) -> MakeInputs:
    return lambda batch, g: {"pixel_values": torch.randn(batch, channels, side, side, generator=g)}


def image(channels: int = 3, side: int = 32) -> MakeInputs:
    return lambda batch, g: (torch.randn(batch, channels, side, side, generator=g),)


def spectrogram(batch: int, g: Generator) -> Inputs:
    return {"input_features": torch.randn(batch, 16, 60, generator=g)}


def audio(batch: int, g: Generator) -> Inputs:
    mask = torch.ones(batch, 800, dtype=torch.long)
    for i in range(batch):
        mask[i, 800 - 100 * (i % 4) :] = 0
    return {"input_values": torch.randn(batch, 800, generator=g), "attention_mask": mask}


# ---------------------------------------------------------------------------------------- transformers

HEADS: dict[str, Any] = {"num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 37}
TEXT = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "max_position_embeddings": 64, **HEADS}
VISION = {"hidden_size": WIDTH, "image_size": 32, "patch_size": 8, **HEADS}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": 4, "n_head": 4, "n_positions": 64, **SPECIAL}
T5: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": WIDTH,
    "d_kv": 8,
    "d_ff": 37,
    "num_layers": 4,
    "num_heads": 4,
}
CAUSAL: dict[str, Any] = {"constants": {"use_cache": False}}  # a key/value cache in the output cannot be exported


@register(text)
def bert() -> nn.Module:
    return hf.BertForSequenceClassification(hf.BertConfig(**TEXT))


@register(text)
def roberta() -> nn.Module:
    return hf.RobertaForSequenceClassification(hf.RobertaConfig(**TEXT, pad_token_id=1))


@register(text)
def distilbert() -> nn.Module:
    sizes = {"dim": WIDTH, "n_layers": 4, "n_heads": 4, "hidden_dim": 37, "max_position_embeddings": 64}
    return hf.DistilBertForSequenceClassification(hf.DistilBertConfig(vocab_size=VOCABULARY, **sizes))


@register(text)
def albert() -> nn.Module:
    """One layer called four times."""
    return hf.AlbertForSequenceClassification(hf.AlbertConfig(**TEXT, embedding_size=16))


@register(text)
def deberta_v2() -> nn.Module:
    relative = {"relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"]}
    other = {"norm_rel_ebd": "layer_norm", "share_att_key": True, "position_biased_input": False}
    return hf.DebertaV2ForSequenceClassification(hf.DebertaV2Config(**TEXT, **relative, **other))


@register(text)
def modernbert() -> nn.Module:
    windows = {"local_attention": 4, "global_attn_every_n_layers": 2, "cls_token_id": 1, "sep_token_id": 2}
    return hf.ModernBertForSequenceClassification(hf.ModernBertConfig(**TEXT, **SPECIAL, **windows))


@register(text)
def electra() -> nn.Module:
    return hf.ElectraForSequenceClassification(hf.ElectraConfig(**TEXT, embedding_size=16))


@register(text)
def mobilebert() -> nn.Module:
    sizes = {"embedding_size": 32, "intra_bottleneck_size": 32, "num_feedforward_networks": 2}
    config = hf.MobileBertConfig(vocab_size=VOCABULARY, hidden_size=64, **HEADS, **sizes)
    return hf.MobileBertForSequenceClassification(config)


@register(pixels())
def vit() -> nn.Module:
    return hf.ViTForImageClassification(hf.ViTConfig(**VISION))


@register(pixels())
def deit() -> nn.Module:
    return hf.DeiTForImageClassification(hf.DeiTConfig(**VISION))


@register(pixels(3, 64), blocks=6)
def swin() -> nn.Module:
    """Windows fold the batch into another axis inside the blocks."""
    sizes = {"embed_dim": 16, "depths": [2, 2, 2], "num_heads": [2, 4, 4], "window_size": 4}
    return hf.SwinForImageClassification(hf.SwinConfig(image_size=64, patch_size=4, **sizes))


@register(pixels(3, 64), blocks=9)
def convnext() -> nn.Module:
    config = hf.ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[2, 2, 3, 2], image_size=64)
    return hf.ConvNextForImageClassification(config)


@register(pixels(3, 64), blocks=9)
def hf_resnet() -> nn.Module:
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [2, 2, 3, 2]}
    return hf.ResNetForImageClassification(hf.ResNetConfig(**sizes, layer_type="basic"))


@register(pixels(3, 64), blocks=16)
def hf_mobilenetv2() -> nn.Module:
    return hf.MobileNetV2ForImageClassification(hf.MobileNetV2Config(image_size=64))


@register(pixels(), exact=False)  # the relative position bias is added in another order
def beit() -> nn.Module:
    return hf.BeitForImageClassification(hf.BeitConfig(**VISION, use_relative_position_bias=True))


@register(pixels(), options={"prediction": "pooler_output"})
def clip_vision() -> nn.Module:
    return hf.CLIPVisionModel(hf.CLIPVisionConfig(**VISION))


@register(spectrogram)
def whisper_enc() -> nn.Module:
    layers = {"encoder_layers": 4, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    sizes = {"d_model": WIDTH, "encoder_ffn_dim": 37, "decoder_ffn_dim": 37, "max_source_positions": 30}
    config = hf.WhisperConfig(vocab_size=VOCABULARY, **layers, **sizes, num_mel_bins=16, decoder_start_token_id=1, **SPECIAL)
    return hf.WhisperModel(config).encoder


@register(audio)
def wav2vec2() -> nn.Module:
    convs = {"conv_dim": (16,) * 3, "conv_stride": (5, 2, 2), "conv_kernel": (10, 3, 3), "num_feat_extract_layers": 3}
    positions = {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 16}
    config = hf.Wav2Vec2Config(hidden_size=WIDTH, **HEADS, **convs, **positions)
    return hf.Wav2Vec2ForSequenceClassification(config)


@register(text, **CAUSAL)
def gpt2() -> nn.Module:
    return hf.GPT2ForSequenceClassification(hf.GPT2Config(**GPT2))


@register(text, **CAUSAL)
def gpt2_lm() -> nn.Module:
    return hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2))


@register(text, **CAUSAL)
def llama() -> nn.Module:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT, num_key_value_heads=2, **SPECIAL))


@register(text, **CAUSAL)
def qwen3() -> nn.Module:
    return hf.Qwen3ForCausalLM(hf.Qwen3Config(**TEXT, num_key_value_heads=2, head_dim=8, **SPECIAL))


@register(text, **CAUSAL)
def gemma() -> nn.Module:
    return hf.GemmaForCausalLM(hf.GemmaConfig(**TEXT, num_key_value_heads=2, head_dim=8, **SPECIAL))


@register(text, **CAUSAL)
def opt() -> nn.Module:
    sizes = {"ffn_dim": 37, "word_embed_proj_dim": WIDTH, "max_position_embeddings": 64}
    layers = {"num_hidden_layers": 4, "num_attention_heads": 4}
    config = hf.OPTConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, **sizes, **layers, **SPECIAL)
    return hf.OPTForSequenceClassification(config)


@register(token_ids, **CAUSAL)
def mamba() -> nn.Module:
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 4, "state_size": 8}
    return hf.MambaForCausalLM(hf.MambaConfig(vocab_size=VOCABULARY, **sizes, **SPECIAL))


@register(text)
def t5_enc() -> nn.Module:
    return hf.T5EncoderModel(hf.T5Config(**T5, decoder_start_token_id=0))


@register(text_pair, options={"prediction": "logits"}, **CAUSAL)
def t5() -> nn.Module:
    """Encoder and decoder: logits per position of the decoder, which has a length of its own."""
    return hf.T5ForConditionalGeneration(hf.T5Config(**T5, decoder_start_token_id=0))


# ---------------------------------------------------------------------------------------- plain torch


@register(tokens, exact=False)  # eager takes a fused kernel in eval mode that export cannot trace
def nn_encoder() -> nn.Module:
    return plain.Encoder()


@register(tokens)
def nn_encoder_sf() -> nn.Module:
    return plain.SequenceFirstEncoder()


@register(tokens, blocks=2, exits=("emb",))
def lstm() -> nn.Module:
    """A stack of two layers in one operator, which capture takes apart."""
    return plain.LSTM()


@register(tokens, blocks=LENGTH)
def lstmcell() -> nn.Module:
    return plain.UnrolledLSTMCell()


@register(image(), blocks=54)
def resnet110() -> nn.Module:
    return plain.CifarResNet(18, 4)


@register(image(1, 28), blocks=0)
def lenet() -> nn.Module:
    return plain.LeNet()


@register(image(3, 224), blocks=0)
def alexnet() -> nn.Module:
    return plain.AlexNet()


@register(image(), blocks=0)
def vgg() -> nn.Module:
    return plain.VGG()


@register(image(), blocks=5)
def msdnet() -> nn.Module:
    return plain.MSDNet()


@register(image(3, 64), blocks=6)
def mobilenet() -> nn.Module:
    return plain.MobileNet()
