"""A decoder split at a block: the lower part, the upper part, and the model's own head, without touching the model.

A shadow is a second tree of module objects that shares parameters, buffers and hooks with the model's; only the forward of
some blocks is another one there. So the user's model can be called, also by another thread, while a shadow runs.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from eecompile.errors import UnsupportedModelError
from eecompile.language.cache import SlotCache, Slots, Written

Forward = Callable[..., Any]
KINDS = {"full_attention", "sliding_attention"}


class _Reached(BaseException):
    """Ends the model's forward once the hidden states are there. No Exception, so that handlers let it through."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


def find_block_list(model: nn.Module) -> str:
    """Path of the `nn.ModuleList` with the decoder's blocks: of those whose members are of one class, the largest.

    Raises:
        UnsupportedModelError: There is none with at least two blocks.
    """
    best, most = "", 0
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) < 2 or len({type(m) for m in module}) != 1:
            continue
        size = sum(p.numel() for p in module.parameters())
        if size > most:
            best, most = path, size
    if not best:
        raise UnsupportedModelError(
            "no repeated block was found in this model",
            got=type(model).__name__,
            wanted="an nn.ModuleList of at least two modules of one class",
            hint="a self-speculative decoder needs a list of decoder layers to split",
        )
    return best


def shadow(module: nn.Module, forwards: Mapping[str, Callable[[nn.Module], Forward]], path: str = "") -> nn.Module:
    """A second tree that shares all state with `module`; `forwards[path](twin)` makes the forward of the module there."""
    twin = object.__new__(type(module))
    twin.__dict__.update(module.__dict__)
    twin.__dict__["_modules"] = {
        name: None if child is None else shadow(child, forwards, f"{path}.{name}" if path else name)
        for name, child in module._modules.items()
    }
    if path in forwards:
        twin.__dict__["forward"] = forwards[path](twin)
    return twin


def without_hooks(twin: nn.Module, *names: str) -> None:
    for name in names:
        twin.__dict__[name] = OrderedDict()


def own_forward(twin: nn.Module) -> Forward:
    """The forward that the module has by its class, or that was set on the instance."""
    set_there: Forward | None = twin.__dict__.get("forward")
    return set_there or type(twin).forward.__get__(twin)


class Split:
    """The parts of one decoder for one generation: each is a call of the model's own code.

    Args:
        model: A causal language model with a cache (`past_key_values`) in its forward.
        blocks: Path of its list of blocks.
        exit: Number of blocks in the lower part, 1 to the number of blocks - 1.
        widths: With how many columns a pass of 1, 2, ... columns runs: some matrix products take longer than larger ones.
    """

    def __init__(self, model: nn.Module, blocks: str, exit: int, widths: Sequence[int] = ()) -> None:
        self.model, self.exit, self.widths = model, exit, widths
        self.count = len(model.get_submodule(blocks))  # type: ignore[arg-type]
        self._hidden: Any = None
        self._tuple = False  # whether blocks return tuples; known after the first lower pass
        paths = [f"{blocks}.{i}" for i in range(self.count)]
        # The lower part ends where the next block begins, after all that hooks do to what is handed on.
        self._lower = shadow(model, {paths[exit - 1]: self._noting, paths[exit]: self._stopping})
        handed = dict.fromkeys(paths[:exit], self._passing) | {paths[exit]: self._injecting}
        self._upper = shadow(model, handed)
        self._paths = paths
        self._head = shadow(model, dict.fromkeys(paths[:-1], self._passing) | {paths[-1]: self._giving})
        names = set(inspect.signature(model.forward).parameters)
        self._keeps = "logits_to_keep" in names
        for needed in ("input_ids", "position_ids", "past_key_values", "attention_mask"):
            if needed not in names:
                raise UnsupportedModelError(
                    f"the model's forward takes no {needed}",
                    got=", ".join(sorted(names)),
                    hint="a self-speculative decoder passes positions, a mask and a cache to the model",
                )
        self._window, self._mixed = windows(model)

    # ------------------------------------------------------------------ forwards of blocks in a shadow

    def _noting(self, twin: nn.Module) -> Forward:
        forward = own_forward(twin)

        def note(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            self._tuple = isinstance(output, tuple)
            return output

        return note

    def _stopping(self, twin: nn.Module) -> Forward:
        def stop(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            raise _Reached(hidden_states)

        return stop

    def _passing(self, twin: nn.Module) -> Forward:
        without_hooks(twin, "_forward_hooks", "_forward_pre_hooks")

        def passing(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            return (hidden_states, None) if self._tuple else hidden_states

        return passing

    def _injecting(self, twin: nn.Module) -> Forward:
        without_hooks(twin, "_forward_pre_hooks")  # they ran in the lower part
        forward = own_forward(twin)

        def inject(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            return forward(self._hidden, *args, **kwargs)

        return inject

    def _giving(self, twin: nn.Module) -> Forward:
        without_hooks(twin, "_forward_hooks", "_forward_pre_hooks")

        def give(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            return (self._hidden, None) if self._tuple else self._hidden

        return give

    def _copying(self, twin: nn.Module) -> Forward:
        without_hooks(twin, "_forward_hooks", "_forward_pre_hooks")
        forward = own_forward(twin)

        def copy(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            try:
                forward(self._hidden, *args, **kwargs)
            except Written:
                return (self._hidden, None) if self._tuple else self._hidden
            raise UnsupportedModelError("a block keeps no keys and values", got=type(twin).__name__)

        return copy

    def _copying_last(self, twin: nn.Module) -> Forward:
        copy = self._copying(twin)

        def copy_and_stop(*args: Any, **kwargs: Any) -> Any:
            copy(*args, **kwargs)
            raise _Reached(self._hidden)

        return copy_and_stop

    @cached_property
    def _copy(self) -> nn.Module:
        copied = dict.fromkeys(self._paths[self.exit :], self._copying) | {self._paths[-1]: self._copying_last}
        return shadow(self.model, dict.fromkeys(self._paths[: self.exit], self._passing) | copied)

    # ------------------------------------------------------------------ passes

    def padded(self, ids: Tensor, slots: Slots) -> tuple[Tensor, Slots]:
        """Ids and slots with the columns added that make the pass faster."""
        given = ids.shape[1]
        more = self.widths[given - 1] - given if given <= len(self.widths) else 0
        if not more:
            return ids, slots
        index = functional.pad(slots.index, (0, more), value=-1)
        return functional.pad(ids, (0, more)), replace(slots, index=index, padded=more)

    def lower(self, ids: Tensor, slots: Slots, cache: SlotCache) -> Tensor:
        """Hidden states `[B, Q, D]` after the first `exit` blocks for token ids `[B, Q]`."""
        given, (ids, slots) = ids.shape[1], self.padded(ids, slots)
        try:
            self._call(self._lower, ids, slots, cache)
        except _Reached as reached:
            return reached.hidden[:, :given]
        raise UnsupportedModelError("the model did not run its blocks in order", got=type(self.model).__name__)

    def upper(self, ids: Tensor, hidden: Tensor, slots: Slots, cache: SlotCache) -> Tensor:
        """Logits `[B, Q, V]` from the hidden states `[B, Q, D]` of the lower part."""
        given, (ids, slots) = ids.shape[1], self.padded(ids, slots)
        self._hidden = functional.pad(hidden, (0, 0, 0, slots.padded)) if slots.padded else hidden
        return self._logits(self._call(self._upper, ids, slots, cache))[:, :given]

    def copy(self, ids: Tensor, hidden: Tensor, slots: Slots, cache: SlotCache) -> None:
        """Writes the upper part's keys and values as if its blocks handed on the hidden states `[B, Q, D]` unchanged."""
        self._hidden, cache.only_written = hidden, True
        try:
            self._call(self._copy, ids, slots, cache)
        except _Reached:
            return
        finally:
            cache.only_written = False
        raise UnsupportedModelError("the model did not run its blocks in order", got=type(self.model).__name__)

    def head(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """Logits `[B, Q, V]` of the model's own norm and head on hidden states `[B, Q, D]`."""
        self._hidden = hidden
        return self._logits(self._head(input_ids=ids, use_cache=False, return_dict=True))

    def full(self, ids: Tensor, slots: Slots, cache: SlotCache) -> Tensor:
        """Logits `[B, Q, V]` of the whole model."""
        return self._logits(self._call(self.model, ids, slots, cache))

    def prefill(self, ids: Tensor, slots: Slots, cache: SlotCache, attention_mask: Tensor) -> Tensor:
        """Logits `[B, 1, V]` of the last column; the model makes its own mask of `attention_mask` [B, length], as always."""
        keep = {"logits_to_keep": 1} if self._keeps else {}
        logits = self._logits(self._call(self.model, ids, slots, cache, attention_mask=attention_mask, **keep))
        return logits[:, -1:]

    def _call(self, module: nn.Module, ids: Tensor, slots: Slots, cache: SlotCache, **more: Any) -> Any:
        cache.at(slots)
        more.setdefault("attention_mask", self._mask(slots))
        return module(
            input_ids=ids, position_ids=slots.positions, past_key_values=cache, use_cache=True, return_dict=True, **more
        )

    def _mask(self, slots: Slots) -> Any:
        dtype = next(p.dtype for p in self.model.parameters() if p.is_floating_point())
        if not self._mixed:
            return slots.mask(self._window, dtype)
        return {"full_attention": slots.mask(None, dtype), "sliding_attention": slots.mask(self._window, dtype)}

    @staticmethod
    def _logits(output: Any) -> Tensor:
        logits = getattr(output, "logits", None)
        if not isinstance(logits, Tensor):
            raise UnsupportedModelError(
                "the model gives no logits", got=type(output).__name__, wanted="an output with .logits [B, S, V]"
            )
        return logits


def windows(model: nn.Module) -> tuple[int | None, bool]:
    """The sliding window of attention, None without one, and whether only some layers have it.

    Raises:
        UnsupportedModelError: Layers of another kind than full or sliding attention.
    """
    config: Any = getattr(model, "config", None)
    if config is None:
        return None, False
    config = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    kinds = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    if kinds - KINDS:
        raise UnsupportedModelError(
            "layers of this kind have no cache that can be rolled back",
            got=", ".join(sorted(kinds - KINDS)),
            wanted=", ".join(sorted(KINDS)),
        )
    if kinds == {"full_attention"} or (not kinds and not getattr(config, "use_sliding_window", True)):
        return None, False
    return window, kinds == KINDS
