"""The compiled decoder: what `eecompile(llm, strategies.SelfSpeculative())` gives."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from math import isnan
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.generation.stopping_criteria import StoppingCriteriaList, StopStringCriteria

from eecompile.errors import MissingMethodError, StrategyError, UnsupportedModelError, near
from eecompile.language.cache import SlotCache, Slots
from eecompile.language.draft import (
    DraftFit,
    DraftFitReport,
    DraftHead,
    fit_draft_head,
    gathered,
    text_batches,
    vocabulary_of,
)
from eecompile.language.generation import DRAFT_COST, Choosing, Counts, DraftOptions, Generation, Row
from eecompile.language.projection import SpeculationReport, project
from eecompile.language.risk import DeferredReport, calibrate_deferred
from eecompile.language.saved import SETTINGS, SavedDecoder, read, write
from eecompile.language.split import Split, find_block_list
from eecompile.language.static import StaticSplit
from eecompile.plain import check_number
from eecompile.strategies.self_speculative import SelfSpeculative
from eecompile.training.checkpoint import Checkpoints

CACHES = (None, "dynamic", "static")
CHECKED = 4  # columns that the check at compile time runs through lower and upper
TOLERANCE, TOLERANCE_OF_HALF = 1e-3, 5e-2  # of the largest logit

# Methods of a compiled classifier that a decoder has others for.
INSTEAD = {
    "run": "fast.run_generate(**inputs) gives the output, where each token came from, and what was accepted",
    "evaluate": "fast.speculation(texts) measures acceptance and times, and gives the speed that follows",
    "benchmark": "fast.speculation(texts) measures acceptance and times, and gives the speed that follows",
    "export": 'fast.save("dir") keeps it for eecompile.load; the model alone is exported by its own tools',
    "set_thresholds": "fast.threshold = 0.8 sets when a drafted token counts as sure, fast.max_draft the length of drafts",
    "explain": "print(fast) shows the split; fast.speculation(texts) the figures of each exit",
    "monitor": 'a decoder with kv="verify" gives the tokens of the model, so there is nothing to watch',
}


@dataclass(frozen=True)
class GenerateTrace:
    """How a generation went.

    Attributes:
        output: What `generate` returns.
        sources: For each row, for each new token: 0 chosen by the full model, 1 drafted at the exit, 2 prompt lookup.
        counts: Passes, drafted and accepted tokens, near-ties.
    """

    output: Any
    sources: tuple[tuple[int, ...], ...]
    counts: Counts

    @property
    def acceptance(self) -> float:
        """Share of the draft head's tokens that were kept; NaN where nothing was drafted."""
        return self.counts.accepted / self.counts.drafted if self.counts.drafted else float("nan")

    def to_dict(self) -> dict[str, Any]:
        acceptance = None if isnan(self.acceptance) else self.acceptance
        return {"sources": [list(s) for s in self.sources], "acceptance": acceptance, **asdict(self.counts)}


class CompiledDecoder(nn.Module):
    """A causal language model that generates with its own lower part as the drafter.

    Called like the model. `generate` takes what the model's own takes and returns the same type; with `kv="verify"` also the
    same tokens.

    Args:
        model: The user's model; shared, never changed.
        strategy: Where it is split, and how tokens are drafted.
        blocks: Path of the list of blocks; None for the one found.
    """

    def __init__(self, model: nn.Module, strategy: SelfSpeculative, blocks: str | None = None) -> None:
        super().__init__()
        config = getattr(model, "config", None)
        if getattr(config, "is_encoder_decoder", False) or not hasattr(model, "generate"):
            raise UnsupportedModelError(
                "self_speculative takes a causal language model of transformers",
                got=f"{type(model).__name__}: {'encoder and decoder' if hasattr(model, 'generate') else 'no generate()'}",
                wanted="a decoder with GenerationMixin.generate",
            )
        self.model = model
        self.strategy = strategy
        self.blocks = blocks or find_block_list(model)
        count = len(model.get_submodule(self.blocks))  # type: ignore[arg-type]
        exit = max(1, count // 3) if strategy.exit is None else strategy.exit
        if not 1 <= exit < count:
            raise StrategyError("exit= is a number of blocks below the whole", got=exit, wanted=f"1 to {count - 1}")
        self.exit = exit
        self.draft_heads = nn.ModuleDict()  # by number of blocks of the lower part
        self.threshold, self.max_draft = strategy.threshold, strategy.max_draft
        self.draft_cost = DRAFT_COST  # in tokens of plain decoding
        self.widths: tuple[int, ...] = ()  # with how many columns passes of 1, 2, ... columns run

    def __getattr__(self, name: str) -> Any:
        if name in INSTEAD:
            raise MissingMethodError(f"a compiled decoder has no {name}()", hint=INSTEAD[name])
        return super().__getattr__(name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    # ------------------------------------------------------------------ generation

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """What `model.generate` gives for these arguments: greedy decoding token for token the same, sampling from the same
        distribution with noise keyed by torch's seed, row and position.

        Raises:
            StrategyError: Something was asked for that has no meaning here (beams, assistants, other caches).
        """
        return self._generated(args, kwargs)[0]

    def run_generate(self, *args: Any, **kwargs: Any) -> GenerateTrace:
        """`generate`, with where each token came from and what was accepted."""
        output, generation = self._generated(args, kwargs)
        return GenerateTrace(output, tuple(tuple(row.sources) for row in generation.rows), generation.counts)

    def decoder(self) -> Callable[..., Any]:
        """A decoding method for `model.generate(..., custom_generate=fast.decoder())`."""
        return self._method([])

    def _generated(self, args: Any, kwargs: Any) -> tuple[Any, Generation]:
        for name in ("custom_generate", "assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit"):
            if kwargs.get(name) is not None:
                raise StrategyError(
                    f"{name}= has no meaning here", got=kwargs[name], hint="drafting is what this module does"
                )
        tokenizer, stop = kwargs.pop("tokenizer", None), kwargs.pop("stop_strings", None)
        if stop is not None:
            if tokenizer is None:
                raise StrategyError("stop_strings= needs the tokenizer", hint="pass tokenizer= as well")
            criterion = StopStringCriteria(tokenizer, stop)
            kwargs["stopping_criteria"] = StoppingCriteriaList([*(kwargs.get("stopping_criteria") or ()), criterion])
        kept: list[Generation] = []
        method = self._method(kept, kwargs.get("streamer"))
        output = self.model.generate(*args, custom_generate=method, **kwargs)  # type: ignore[operator]
        return output, kept[0]

    def _method(self, kept: list[Generation], given: Any = None) -> Callable[..., Any]:
        """`given` is the streamer: transformers hands none on to a decoding method that is a function."""

        def self_speculative(
            model: Any,
            input_ids: Tensor,
            logits_processor: Any,
            stopping_criteria: Any,
            generation_config: Any,
            synced_gpus: bool = False,
            streamer: Any = None,
            **model_kwargs: Any,
        ) -> Any:
            streamer = given if streamer is None else streamer
            _refuse(generation_config, model_kwargs, input_ids, streamer, self.strategy.kv)
            generation = self._generation(generation_config, logits_processor, stopping_criteria, len(input_ids))
            kept.append(generation)
            mask = model_kwargs.get("attention_mask")
            mask = torch.ones_like(input_ids) if mask is None else mask
            emit = None if streamer is None else lambda tokens: streamer.put(torch.tensor(tokens))
            with torch.no_grad():
                rows = generation.run(input_ids, mask, model_kwargs.get("past_key_values"), emit)
                if streamer is not None:
                    streamer.end()
                return _assembled(generation, rows, generation_config, input_ids, stopping_criteria)

        return self_speculative

    def _generation(self, config: Any, processor: Any, stopping: Any, rows: int) -> Generation:
        seed = int(torch.randint(2**62, ()).item()) if config.do_sample else None
        dict_wanted = bool(config.return_dict_in_generate)
        choosing = Choosing(
            processor, stopping, seed, dict_wanted and bool(config.output_scores),
            dict_wanted and bool(config.output_logits), rows,
        )  # fmt: skip
        cost = self.draft_cost if self.strategy.kv == "verify" else 0.0  # kept drafts always give
        options = DraftOptions(self.threshold, self.max_draft, self.strategy.longest_lookup, cost, self.strategy.kv)
        split = self._split(config)
        head = self.draft_head
        best = head.best if isinstance(head, DraftHead) else None
        return Generation(split, self._head(split), options, choosing, config.max_length, best)

    def _split(self, config: Any) -> Split:
        if config.cache_implementation != "static":
            return Split(self.model, self.blocks, self.exit, self.widths)
        return StaticSplit(self.model, self.blocks, self.exit, self.max_draft + 1, config.max_length)

    @property
    def draft_head(self) -> DraftHead | None:
        """The trained head at the exit, None where the model's own norm and head draft."""
        if str(self.exit) not in self.draft_heads:
            return None
        found: Any = self.draft_heads[str(self.exit)]
        return cast(DraftHead, found)

    def _head(self, split: Split) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]:
        head = self.draft_head
        if head is None:
            return lambda ids, hidden: (split.head(ids, hidden), None)
        return lambda ids, hidden: (head(hidden.float()), head.vocabulary)

    # ------------------------------------------------------------------ training, checking, reporting

    def fit(
        self,
        loader: Iterable[Any],
        *,
        epochs: int = 20,
        lr: float = 2e-3,
        rank: int = 128,
        tokens: int = 100_000,
        seed: int = 0,
        checkpoint_dir: str | os.PathLike[str] | None = None,
        resume: bool | str = True,
    ) -> DraftFitReport:
        """Trains a light draft head on the model's own next tokens; the model stays frozen.

        Args:
            loader: Batches of token ids `[B, S]`, or dicts of a tokenizer with `input_ids` and `attention_mask`.
            epochs: Most passes over the kept hidden states; fitting stops early on held-out positions.
            lr: Learning rate of AdamW.
            rank: Size between the head's two projections, 0 for a single one.
            tokens: Most positions whose hidden states are kept.
            seed: Of the head's weights and of the held-out positions.
            checkpoint_dir: Where a checkpoint goes after every epoch. None: none are written.
            resume: True goes on from the newest checkpoint if there is one, "must" insists on one, False starts anew. The
                hidden states are computed again; the head ends with the same numbers as without the break.

        Raises:
            StrategyError: No text, numbers out of range, or a checkpoint of another run.
        """
        for name, value, least in (("epochs", epochs, 1), ("rank", rank, 0), ("tokens", tokens, 2), ("seed", seed, 0)):
            check_number(name, value, least=least, whole=True, error=StrategyError)
        check_number("lr", lr, above=0, error=StrategyError)
        states, choices = gathered(self.model, self.blocks, self.exit, loader, tokens)
        options = DraftFit(self.strategy.draft_vocab, rank, epochs, lr, seed)
        checkpoints = None if checkpoint_dir is None else Checkpoints(Path(checkpoint_dir) / f"exit-{self.exit}")
        head, report = fit_draft_head(states, choices, options, checkpoints, resume)
        self.draft_heads[str(self.exit)] = head
        return report

    def speculation(
        self, loader: Iterable[Any], *, exits: Sequence[int] | None = None, positions: int = 2000
    ) -> SpeculationReport:
        """Acceptance on text and times on this machine for several exits, and the speed that follows; nothing is set.

        Args:
            loader: Batches of token ids, as for `fit`.
            exits: Numbers of blocks to try; by default those with a trained head, else some six evenly spaced ones.
            positions: Positions of text that acceptance is measured on.
        """
        count = len(self.model.get_submodule(self.blocks))  # type: ignore[arg-type]
        if exits is None:
            exits = [int(e) for e in self.draft_heads] or list(range(1, count, max(1, (count - 1) // 6)))
        check_number("positions", positions, least=1, whole=True, error=StrategyError)
        if not exits or isinstance(exits, int | float | str):
            raise StrategyError("exits= are numbers of blocks", got=repr(exits), wanted=f"some of 1 to {count - 1}")
        for e in exits:
            check_number("an exit, a number of blocks,", e, least=1, most=count - 1, whole=True, error=StrategyError)
        heads: Any = {int(e): head for e, head in self.draft_heads.items()}
        return project(self.model, self.blocks, exits, heads, loader, positions)

    def calibrate(self, loader: Iterable[Any], **options: Any) -> SpeculationReport | DeferredReport:
        """Chooses how tokens are drafted, on text like that in use.

        With `kv="verify"` exit, threshold and length of drafts by the speed that `speculation` projects from acceptance on
        text and times on this machine; with the others the threshold, by a bound on what a sequence loses.

        Args:
            loader: Batches of token ids, as for `fit`; for "deferred" and "copy" they are prompts.
            options: For "verify": `min_speed=1.1`, the projected speed over plain decoding below which nothing is set, and
                those of `speculation`. For the others: `max_new_tokens=32`, and those of
                `eecompile.language.risk.calibrate_deferred`: `max_drop=0.05`, `delta=0.05`, `metric=None`, `seed=0`.

        Raises:
            StrategyError: An option of the other kind, or a projected speed below `min_speed`; the message holds the table.
            CalibrationError: Options out of range, or too few sequences.
        """
        chosen = self._by_speed if self.strategy.kv == "verify" else self._by_risk
        known = [n for n in inspect.signature(chosen).parameters if n not in ("loader", "risk")]
        known += [] if self.strategy.kv == "verify" else inspect.getfullargspec(calibrate_deferred).kwonlyargs
        for name in options:
            if name not in known:
                raise StrategyError(
                    f"calibrate has no such option with kv={self.strategy.kv!r}", got=f"{name}=", wanted=near(name, known)
                )
        return chosen(loader, **options)

    def _by_speed(
        self, loader: Iterable[Any], min_speed: float = 1.1, exits: Sequence[int] | None = None, positions: int = 2000
    ) -> SpeculationReport:
        check_number("min_speed", min_speed, least=0, error=StrategyError)
        report = self.speculation(loader, exits=exits, positions=positions)
        best = report.best
        if best.speed < min_speed:
            raise StrategyError(
                "drafting with the lower part of this model does not pay here",
                got=f"a projected speed of {best.speed:.2f}x\n{report}",
                wanted=f"at least {min_speed}x",
                hint="fit() a light draft head first, or lower min_speed=",
            )
        for name in SETTINGS:
            setattr(self, name, getattr(best, name))
        return report

    def _by_risk(self, loader: Iterable[Any], max_new_tokens: int = 32, **risk: Any) -> DeferredReport:
        check_number("max_new_tokens", max_new_tokens, least=1, whole=True, error=StrategyError)
        before, prompts = self.threshold, text_batches(loader, vocabulary_of(self.model))

        def generate(threshold: float, ids: Tensor, mask: Tensor) -> tuple[list[Tensor], list[float]]:
            self.threshold = threshold
            inputs = {"input_ids": ids, "attention_mask": mask}
            trace = self.run_generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=0)
            shares = [row.count(0) / len(row) for row in trace.sources]
            start = ids.shape[1]
            return [out[start : start + len(r)] for out, r in zip(trace.output, trace.sources, strict=True)], shares

        try:
            report = calibrate_deferred(generate, prompts, **risk)
        except BaseException:
            self.threshold = before
            raise
        self.threshold = report.threshold
        return report

    def save(self, path: Any) -> None:
        """Writes a directory that `eecompile.load` reads, the model's weights with it.

        Raises:
            ArtifactError: The model's class is none of transformers; the directory holds something else; a write failed.
        """
        settings = {name: getattr(self, name) for name in SETTINGS}
        write(SavedDecoder(self.model, self.strategy, self.blocks, settings, self.draft_heads), path)

    @classmethod
    def load(cls, directory: Path, manifest: dict[str, Any]) -> CompiledDecoder:
        """A saved one, in eval mode on the CPU; `eecompile.load` calls this.

        Raises:
            ArtifactError: Missing, truncated or altered files, or a class that the installed transformers does not have.
        """
        parts = read(directory, manifest)
        found = cls(parts.model, parts.strategy, parts.blocks)
        for name, value in parts.settings.items():
            setattr(found, name, value)
        found.draft_heads = parts.draft_heads
        return found.eval()

    @torch.no_grad()
    def check(self, ids: Tensor, attention_mask: Tensor | None = None) -> None:
        """Compares the parts with the whole model on token ids `[B, S]`, rows at their own pace, after a rejected draft.

        Raises:
            UnsupportedModelError: They differ: something in the model needs what a slot-addressed cache does not give.
        """
        mask = torch.ones_like(ids) if attention_mask is None else attention_mask
        if len(ids) == 1:
            ids, mask = ids.expand(2, -1), mask.expand(2, -1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        wanted = self.model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        try:
            got, columns = self._in_parts(ids, mask)
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError) as e:
            raise UnsupportedModelError(
                "this decoder cannot be run in two parts",
                where=f"{self.blocks}[:{self.exit}]",
                got=f"{type(e).__name__}: {e}",
            ) from e
        real = mask.gather(1, columns).bool()
        wanted, got = wanted.gather(1, columns[:, :, None].expand(-1, -1, wanted.shape[2]))[real], got[real]
        difference, scale = float((got - wanted).abs().max()), float(wanted.abs().max())
        half = wanted.dtype in (torch.float16, torch.bfloat16)
        if not difference <= (TOLERANCE_OF_HALF if half else TOLERANCE) * max(scale, 1.0):
            raise UnsupportedModelError(
                "this decoder gives other logits when it runs in two parts",
                where=f"{self.blocks}[:{self.exit}]",
                got=f"a difference of {difference:.3g} where logits reach {scale:.3g}",
                hint="its masks or positions do not follow the 4D mask and position_ids that it is given",
            )

    def _in_parts(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Logits `[B, Q, V]` by lower and upper, and which columns `[B, Q]` of the ids they belong to."""
        split = Split(self.model, self.blocks, self.exit)
        cache = SlotCache(split.count)
        batch, length = ids.shape
        padding, start = mask.argmax(1), length - min(CHECKED, length - 1)
        index = torch.arange(length, device=ids.device).expand(batch, -1)
        split.prefill(ids[:, :start], Slots(index[:, :start], padding, start, True), cache, mask[:, :start])

        def both(tokens: Tensor, slots: Slots) -> Tensor:
            return split.upper(tokens, split.lower(tokens, slots, cache), slots, cache)

        wrong, there = ids.roll(1, 1)[:, start:], Slots(index[:, start:], padding, length, True)
        if self.strategy.kv == "copy":
            split.copy(wrong, split.lower(wrong, there, cache), there, cache)
        both(wrong, there)  # a draft that is rejected
        if length - start == 1:
            return both(ids[:, start:], Slots(index[:, start:], padding, length, True)), index[:, start:]
        first = index[:, start : start + 1]  # every other row is one token ahead of its neighbour
        ahead = torch.arange(batch, device=ids.device)[:, None] % 2
        both(ids.gather(1, first), Slots(torch.where(ahead > 0, first, -1), padding, start + 1, False))
        columns = index[:, start:-1] + ahead
        return both(ids.gather(1, columns), Slots(columns, padding, length, False)), columns

    def extra_repr(self) -> str:
        count = len(self.model.get_submodule(self.blocks))  # type: ignore[arg-type]
        head = "the model's own head" if self.draft_head is None else f"{self.draft_head.vocabulary.numel()} draft tokens"
        return (
            f"exit after {self.exit} of {count} blocks, {head}, up to {self.max_draft} drafted at {self.threshold}, "
            f"kv={self.strategy.kv!r}"
        )


def _refuse(config: Any, model_kwargs: dict[str, Any], ids: Tensor, streamer: Any, kv: str) -> None:
    """Names what was asked for and cannot be honoured."""
    mode = config.get_generation_mode()
    wrong = {
        "beams, contrastive search or an assistant": str(mode.value)
        if mode.value not in ("greedy_search", "sample")
        else None,
        "output_attentions": config.output_attentions or None,
        "output_hidden_states": config.output_hidden_states or None,
        "cache_implementation": None if config.cache_implementation in CACHES else config.cache_implementation,
        "use_cache=False": "use_cache=False" if config.use_cache is False else None,
        "guidance_scale": config.guidance_scale if config.guidance_scale not in (None, 1, 1.0) else None,
        "inputs_embeds": True if model_kwargs.get("inputs_embeds") is not None else None,
        "output_scores or output_logits with kv='copy'": True
        if kv == "copy" and (config.output_scores or config.output_logits)
        else None,
        "a prompt of length 0": True if ids.shape[1] == 0 else None,
    }
    for what, got in wrong.items():
        if got is not None:
            raise StrategyError(
                f"self-speculative generation does not take {what}",
                got=got,
                wanted="greedy decoding or sampling from token ids",
            )
    if streamer is not None and ids.shape[0] != 1:
        raise StrategyError("a streamer takes one row", got=f"a batch of {ids.shape[0]}")


def _assembled(generation: Generation, rows: list[Row], config: Any, ids: Tensor, stopping: Any) -> Any:
    """Sequences of one length, padded where a row has stopped earlier, in the type that was asked for."""
    longest = max(len(row.ids) for row in rows)
    pads = [longest - len(row.ids) for row in rows]
    pad = 0
    if any(pads):
        if config._pad_token_tensor is None:
            raise StrategyError("rows stop at different lengths and there is no padding token", hint="pass pad_token_id=")
        pad = int(config._pad_token_tensor)
    sequences = torch.tensor([row.ids + [pad] * n for row, n in zip(rows, pads, strict=True)], device=ids.device)
    if not config.return_dict_in_generate:
        return sequences
    from transformers.generation.utils import GenerateDecoderOnlyOutput

    def steps(kept: str) -> tuple[Tensor, ...]:
        lists = [getattr(row, kept) for row in rows]
        size = lists[0][0].numel()
        return tuple(
            torch.stack([line[i] if i < len(line) else line[0].new_full((size,), float("nan")) for line in lists])
            for i in range(max(map(len, lists)))
        )

    cache = generation.finish(sequences)
    choosing = generation.choosing
    return GenerateDecoderOnlyOutput(
        sequences=sequences,
        scores=steps("scores") if choosing.keep_scores else None,
        logits=steps("logits") if choosing.keep_logits else None,
        past_key_values=cache,
    )


def compile_decoder(
    model: nn.Module, strategy: SelfSpeculative, args: tuple[Any, ...], kwargs: dict[str, Any], blocks: str | None
) -> CompiledDecoder:
    """Splits the model, and checks the parts against the whole on the example.

    Raises:
        UnsupportedModelError: No causal decoder, no repeated block, or parts that give other logits than the whole.
        StrategyError: No example of token ids.
    """
    given = kwargs.get("input_ids", args[0] if args else None)
    if not isinstance(given, Tensor) or given.dim() != 2 or given.shape[1] < 2:
        raise StrategyError(
            "self_speculative needs an example of token ids",
            got="nothing"
            if given is None
            else f"{list(given.shape)}"
            if isinstance(given, Tensor)
            else type(given).__name__,
            wanted="example_kwargs={'input_ids': [B, S], ...} with S of at least 2",
        )
    was = model.training
    model.eval()
    try:
        found = CompiledDecoder(model, strategy, blocks)
        found.check(given, kwargs.get("attention_mask"))
    finally:
        model.train(was)
    return found.eval() if not was else found
