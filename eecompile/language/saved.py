"""Saved decoders: the weights and configuration of the model, the draft heads, and what was set."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn

from eecompile.artifact import files
from eecompile.errors import ArtifactError
from eecompile.language.draft import DraftHead
from eecompile.plain import as_path
from eecompile.strategies.self_speculative import SelfSpeculative

KIND = "decoder"


SETTINGS = ("exit", "threshold", "max_draft", "widths", "draft_cost")
"""Attributes of a decoder that `calibrate` chooses and `save` keeps."""


@dataclass(frozen=True)
class SavedDecoder:
    """What a decoder is made of.

    Attributes:
        blocks: Path of the model's list of blocks.
        settings: The decoder's `SETTINGS`, by name.
        draft_heads: By number of blocks of the lower part that they were trained for.
    """

    model: nn.Module
    strategy: SelfSpeculative
    blocks: str
    settings: dict[str, Any]
    draft_heads: nn.ModuleDict


def write(decoder: SavedDecoder, path: Any) -> None:
    """Writes a directory that `eecompile.load` reads.

    Raises:
        ArtifactError: The model's class is none of transformers; the directory holds something else; a write failed.
    """
    model: Any = decoder.model
    name = type(model).__name__
    if getattr(transformers, name, None) is not type(model):
        raise ArtifactError(
            "only models whose class is one of transformers are saved with their weights",
            got=f"{type(model).__module__}.{name}",
            hint="save the model your own way, and decoder.draft_heads.state_dict() with it",
        )
    directory = files.free_place(as_path("path", path, ArtifactError))
    heads = {f"{exit}.{n}": t.detach().cpu() for exit, h in decoder.draft_heads.items() for n, t in h.state_dict().items()}
    manifest = {
        "format": files.FORMAT,
        "version": files.VERSION,
        "kind": KIND,
        "class": name,
        "config": model.config.to_dict(),
        "generation_config": model.generation_config.to_dict(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "strategy": asdict(decoder.strategy),
        "blocks": decoder.blocks,
        "settings": decoder.settings,
    }

    def put_all(entries: dict[str, Any]) -> None:
        entries["weights"] = files.put(directory, "weights", ".safetensors", lambda p: save_model(model, str(p)))
        entries["heads"] = files.put(directory, "heads", ".safetensors", lambda p: save_file(heads, p))

    files.save(directory, manifest, put_all)


def read(directory: Path, manifest: dict[str, Any]) -> SavedDecoder:
    """What a directory holds that `write` wrote, in eval mode on the CPU.

    Raises:
        ArtifactError: Missing, truncated or altered files, or a class that the installed transformers does not have.
    """
    paths = {name: files.checked(directory, entry) for name, entry in manifest["files"].items()}
    try:
        with torch.random.fork_rng(devices=[]):  # weights are drawn, and then replaced
            return _rebuilt(manifest, paths)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, SafetensorError) as error:
        raise ArtifactError(
            "the saved decoder cannot be rebuilt", where=str(directory), got=f"{type(error).__name__}: {error}"
        ) from error


def _rebuilt(manifest: dict[str, Any], paths: dict[str, Path]) -> SavedDecoder:
    tensors, heads = load_file(paths["heads"]), nn.ModuleDict()
    for exit in sorted({name.partition(".")[0] for name in tensors}):
        state = {n.partition(".")[2]: t for n, t in tensors.items() if n.startswith(f"{exit}.")}
        down = state.get("down.weight")
        head = DraftHead(state["norm.weight"].numel(), state["vocabulary"], 0 if down is None else len(down))
        head.load_state_dict(state)
        heads[exit] = head.eval()
    settings = {name: manifest["settings"][name] for name in SETTINGS}
    settings["widths"] = tuple(settings["widths"])
    return SavedDecoder(_model(manifest, paths["weights"]), _strategy(manifest), manifest["blocks"], settings, heads)


def _strategy(manifest: dict[str, Any]) -> SelfSpeculative:
    known = {f.name for f in fields(SelfSpeculative)}
    return SelfSpeculative(**{name: value for name, value in manifest["strategy"].items() if name in known})


def _model(manifest: dict[str, Any], weights: Path) -> nn.Module:
    named = getattr(transformers, str(manifest["class"]), None)
    if not (isinstance(named, type) and issubclass(named, transformers.PreTrainedModel)):
        raise ArtifactError(
            "the installed transformers has no such model",
            got=manifest["class"],
            hint=f"transformers {transformers.__version__} is installed",
        )
    kind: Any = named
    model: nn.Module = kind(kind.config_class.from_dict(manifest["config"])).to(getattr(torch, manifest["dtype"]))
    model.generation_config = transformers.GenerationConfig.from_dict(manifest["generation_config"])
    missing, unexpected = load_model(model, weights)
    if missing or unexpected:
        raise ArtifactError("the saved weights are not those of the model", got=", ".join([*missing, *unexpected][:6]))
    return model.eval()
