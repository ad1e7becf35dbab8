"""`load(path)`: a saved program, rebuilt by the same passes that made it."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

import eecompile.ops
from eecompile.artifact import files
from eecompile.artifact.read_choices import insert_saved
from eecompile.artifact.records import record, records
from eecompile.calibration.guarantee import Guarantee
from eecompile.capture.archive import load_archive
from eecompile.capture.export import Captured, flat_graph
from eecompile.capture.exported import program_graph
from eecompile.capture.quiet import quiet
from eecompile.capture.tensors import share_tensors
from eecompile.criteria import criterion
from eecompile.errors import ArtifactError, EecompileError, MissingDependencyError, StrategyError
from eecompile.heads import Branch, rebuild, score_head
from eecompile.module import CompiledModule
from eecompile.own_trunk import COPIED, IN_PLACE, NOT_SAVED
from eecompile.passes import (
    Annotate,
    FindBlocks,
    FindCuts,
    Lower,
    StagePass,
    Unfold,
    prepared,
    run_passes,
    sites,
)
from eecompile.passes.insert_exits import (
    HEADS,
    EnsembleWeights,
    InsertExits,
    cut_of,
    relocate,
)
from eecompile.plain import as_path
from eecompile.program import Capture, Exit, Place, Prediction, Program
from eecompile.runtime.origin import Origin
from eecompile.signature import Signature
from eecompile.strategies import STRATEGIES, Strategy
from eecompile.strategies import strategy as strategy_of

LOADED = "loaded from "
assert eecompile.ops is not None  # registers the operators that graphs may hold


def read(path: str | Path) -> CompiledModule:
    """Loads a directory written by `save`; that of a decoder gives a `CompiledDecoder`.

    Raises:
        ArtifactError: Missing, truncated, altered or foreign files.
        MissingDependencyError: A decoder, and transformers is not installed.
    """
    directory = as_path("path", path, ArtifactError)
    data = files.manifest_of(directory)
    if data.get("kind") == "decoder":
        if importlib.util.find_spec("transformers") is None:
            raise MissingDependencyError(
                "a saved language model needs transformers", where=str(directory), hint="pip install 'eecompile[hf]'"
            )
        from eecompile.language import CompiledDecoder

        return cast(CompiledModule, CompiledDecoder.load(directory, data))
    try:
        return _read(directory, data)
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ArtifactError(
            "the manifest does not describe a program",
            where=str(directory / files.MANIFEST),
            got=f"{type(error).__name__}: {error}",
        ) from error


def _read(directory: Path, data: dict[str, Any]) -> CompiledModule:
    paths = {name: files.checked(directory, entry) for name, entry in data["files"].items()}
    signature = Signature.from_dict(data["signature"])
    exported = _exported(paths["eval"])
    names = [leaf.path for leaf in signature.inputs]
    graph_module = flat_graph(exported, "m", names) if _adapted(exported) else program_graph(exported)[0]
    graph_module.meta.clear()
    models = tuple(data.get("models", ()))
    captured = Capture(models=models, places=records(Place, data.get("places", [])))
    program = Program(graph_module, graph_module, signature, capture=captured, prediction=Prediction(data["prediction"]))
    program = run_passes(program, [*prepared(models), Annotate(), FindBlocks(data.get("blocks")), Unfold(), FindCuts()])
    tensors = _tensors(paths["heads"])
    exits = tuple(record(Exit, {**e, "criterion": criterion(e["criterion"])}) for e in data["exits"])
    customs = {name.removeprefix("branch "): _plain(_exported(p)) for name, p in paths.items() if name.startswith("branch ")}
    program = insert_saved(program, data["choices"], exits, tensors, customs)
    program = program.replace(exits=relocate(program, exits))
    if len(exits) != len(data["heads"]):
        raise ArtifactError(
            "the parts of the saved program do not fit one another",
            where=str(directory / files.MANIFEST),
            got=f"{len(exits)} exits, {len(data['heads'])} heads",
        )
    combination = _combination(tensors)
    heads = _heads(program, data["heads"], paths, tensors)
    insert = InsertExits(heads=heads, combination=combination)
    program = run_passes(program, [insert, StagePass(), Lower()], facts=frozenset({"exits placed"}))
    origin = Origin(
        exported=exported,
        autocast=data.get("autocast", ()),
        notes=[*_notes(data["notes"]), f"{LOADED}{directory.name}"],
    )
    trained: tuple[Signature, ExportedProgram] | None = None
    if "train" in paths:
        trained = Signature.from_dict(data["train_signature"]), _exported(paths["train"])
        origin.capture_training = partial(_train_capture, *trained, names)
    strategy = _strategy(data["strategy"])
    fast = CompiledModule(program, strategy, executor=data["executor"], backend=data["backend"], origin=origin)
    if trained is not None:
        fast.training_graphs.signature, fast.training_graphs.exported = trained
    fast.task = data.get("task")
    fast.guarantee = None if data["guarantee"] is None else Guarantee.from_dict(data["guarantee"])
    try:
        fast.live.restore(data["settings"])
    except StrategyError as error:
        raise ArtifactError(
            "the saved settings do not fit the program", where=str(directory / files.MANIFEST), got=str(error)
        ) from error
    return fast


def _train_capture(
    signature: Signature, exported: ExportedProgram, names: Sequence[str], program: Program, model: nn.Module | None
) -> Captured:
    """The saved capture in train mode, over the parameters of the loaded program."""
    graph = flat_graph(exported, "m", names, training=True)
    share_tensors(graph, program.source)
    return Captured(graph, signature, exported, None)


def _notes(saved: list[str]) -> list[str]:
    """Those that still hold."""
    return [NOT_SAVED if n in (COPIED, IN_PLACE) else n for n in saved if not n.startswith(LOADED)]


def _exported(path: Path) -> ExportedProgram:
    files.refuse_pickles(path)
    try:
        with quiet():
            return load_archive(path)
    except Exception as error:  # torch raises many unrelated types on a damaged archive
        raise ArtifactError(
            "the exported program cannot be read", where=str(path), got=f"{type(error).__name__}: {error}"[:300]
        ) from error


def _adapted(exported: ExportedProgram) -> bool:
    """Whether the program was exported through the flat adapter, whose one attribute is `m`."""
    names = list(exported.state_dict) + [str(k) for k in exported.constants]
    return all(n.startswith("m.") for n in exported.state_dict) and bool(names)


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ArtifactError("the weights are not a safetensors file", where=str(path), got=str(error)) from error


def _strategy(data: dict[str, Any]) -> Strategy:
    """The saved strategy; heads that were modules of the user's are named only."""
    try:
        return strategy_of(_known(data))
    except EecompileError as error:
        raise ArtifactError(
            "the saved strategy is not known here", got=data.get("name"), wanted=", ".join(STRATEGIES)
        ) from error


def _known(data: dict[str, Any]) -> dict[str, Any]:
    """The options without those that were the user's own modules, in the parts of a sum too."""
    known = {k: v for k, v in data.items() if v != "custom"}
    if isinstance(known.get("parts"), list):
        known["parts"] = [_known(part) if isinstance(part, dict) else part for part in known["parts"]]
    return known


def _combination(tensors: dict[str, Tensor]) -> EnsembleWeights | None:
    """The trained weights of the exits' ensemble, taken out of `tensors`; None where there are none."""
    own = {name: tensors.pop(f"combination.{name}", None) for name in ("weights", "bias")}
    weights, bias = own["weights"], own["bias"]
    if weights is None and bias is None:
        return None
    if weights is None or bias is None or weights.shape[0] != bias.shape[0]:
        raise ArtifactError("the weights of the exits' ensemble are incomplete", got=str(sorted(own)))
    found = EnsembleWeights(*bias.shape)
    found.load_state_dict({"weights": weights, "bias": bias}, assign=True)
    return found


def _heads(
    program: Program, described: dict[str, Any], paths: dict[str, Path], tensors: dict[str, Tensor]
) -> dict[str, Branch]:
    heads: dict[str, Branch] = {}
    for e in program.exits:
        data = described[e.name]
        if data["kind"] == "shared":
            tail = sites.tail_of(program, e)
            if not isinstance(tail, sites.Tail):
                raise ArtifactError("the model's own head is not found again", where=e.name, got=tail.reason)
            score = score_head(sites.site_at(program, cut_of(program, e), e.mask_input)[0]) if data["score"] else None
            heads[e.name] = Branch(tail.module, score, bool(tail.sides))
        elif data["kind"] == "custom":
            exported = _exported(paths[f"head {e.name}"])
            module: nn.Module = _plain(exported)
            score = score_head(sites.site_at(program, cut_of(program, e), e.mask_input)[0]) if data["score"] else None
            heads[e.name] = Branch(module, score, data["takes_mask"])
        else:
            heads[e.name] = rebuild(data)
        own = {k.removeprefix(f"{e.name}."): v for k, v in tensors.items() if k.startswith(f"{e.name}.")}
        wanted = heads[e.name].state_dict()
        if data["kind"] == "shared":
            wanted = {k: v for k, v in wanted.items() if k.startswith("score.")}
        missing = sorted(set(wanted) ^ set(own))
        if missing:
            raise ArtifactError("the weights do not fit the heads", where=f"{HEADS}.{e.name}", got=missing[:5])
        heads[e.name].load_state_dict(own, strict=False, assign=True)  # in the dtype that was saved
    return heads


def _plain(exported: ExportedProgram) -> fx.GraphModule:
    """A head as a plain graph, which has a train() and can be copied; the exported program's own module has and can not."""
    names = [s.arg.name for s in exported.graph_signature.input_specs if s.kind.name == "USER_INPUT"]
    module = flat_graph(exported, "", names)
    module.meta.clear()
    for n in module.graph.nodes:
        n.meta.clear()
    return module
