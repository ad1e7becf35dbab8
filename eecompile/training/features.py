"""What the heads of a frozen trunk read, computed once for all rows and kept: every later step of `fit` starts there.

Shapes: B rows, D features, C classes, S positions. A *feature* is what a head's layers read at an exit: the mean over the
real positions or the first one `[B, D]`, or the whole value. Where the model predicts per position, a row of a block is one
labelled position.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler

from eecompile.errors import EecompileError
from eecompile.heads import Branch, Head
from eecompile.passes import facts, sites
from eecompile.passes.sites import Tail
from eecompile.program import Exit
from eecompile.training.batches import Batch, batches, empty_loader, iterate, length_of, no_labels
from eecompile.training.cache import Cache
from eecompile.training.objectives import Objective, PerExitLoss
from eecompile.training.scores import check_labels, labelled
from eecompile.training.stages import parts_of
from eecompile.training.state import reseed

if TYPE_CHECKING:
    from eecompile.module import CompiledModule

MODEL = "model"  # the name that the model's own output is kept under
BLOCK, BLOCK_BYTES = 1024, 2**26  # rows of a block, or bytes: what is computed on at once
HELD_OUT = 0.2
LEAST_TO_CHOOSE = 50  # with fewer rows nothing is held out: a handful of rows chooses by chance
ALL_NEW = 0.5  # share of a batch's rows that were not in the first pass, above which the data change


class NotCached(Exception):
    """Why features cannot be kept; `fit` then trains batch by batch and reports this."""


@dataclass
class Slot:
    """One exit whose head is fitted, and the features that are kept for it.

    Attributes:
        axis: Batch axis of the value that the head reads.
        reads: Names of what is kept: "mean", "first", "all", "shared" for what the model's final layers give, or "logits"
            of a head without parameters of its own.
        mask: Whether the padding mask is kept as well.
        tail: The model's final layers, where they can be the head.
    """

    exit: Exit
    branch: Branch
    axis: int
    reads: tuple[str, ...]
    mask: bool = False
    tail: fx.GraphModule | None = None

    def key(self, read: str) -> str:
        return f"{self.exit.name}.{read}"


@dataclass
class Block:
    """Rows that were computed together, in the order of the loader.

    Attributes:
        labels: None, a tensor or a tree of tensors with these rows first.
        row: [n] int64: which row of a pass over the data each is.
        train: Indices of the rows to fit to.
        held: Indices of the rows to choose on.
    """

    index: int
    labels: Any
    row: Tensor
    validation: bool
    train: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    held: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))


@dataclass
class Features:
    """All blocks, and the cache with their features."""

    cache: Cache
    slots: list[Slot]
    blocks: list[Block] = field(default_factory=list)
    draws: int = 1
    rows: int = 0
    notes: list[str] = field(default_factory=list)

    def feature(self, slot: Slot, read: str, block: Block, rows: Tensor | slice = slice(None)) -> Tensor:
        return self.cache.block(slot.key(read), block.index)[rows]

    def mask(self, slot: Slot, block: Block, rows: Tensor | slice = slice(None)) -> Tensor | None:
        return self.cache.block(slot.key("mask"), block.index)[rows] if slot.mask else None

    def teacher(self, block: Block, rows: Tensor | slice = slice(None)) -> Tensor:
        return self.cache.block(MODEL, block.index)[rows]

    @property
    def held_rows(self) -> int:
        return sum(len(b.held) for b in self.blocks)


def labels_at(labels: Any, rows: Tensor | slice) -> Any:
    """The labels of these rows."""
    return tree_map(lambda t: t[rows], labels)


class Collector:
    """One pass of the trunk over the data, or several where the data change from pass to pass.

    Args:
        fast: The compiled module.
        slots: What to keep.
        objective: Checks the labels of every batch.
        draws: Passes over the training data; None for one, or `epochs` where a second pass gives other inputs.
    """

    def __init__(
        self,
        fast: CompiledModule,
        slots: Sequence[Slot],
        objective: Objective,
        cache: Cache,
        draws: int | None,
        epochs: int,
        seed: int,
    ) -> None:
        self.fast, self.objective, self.seed = fast, objective, seed
        self.classes = not any(isinstance(part, PerExitLoss) for part in parts_of(objective))
        self.draws, self.epochs = draws, epochs
        self.features = Features(cache, list(slots))
        self.trunk, self.at = trunk_graph(fast, slots)
        self.pending: dict[str, list[Tensor]] = {}
        self.pending_labels: list[Any] = []
        self.pending_rows: list[Tensor] = []
        self.digests: set[int] | None = None

    def run(
        self, loader: Iterable[Any], val_loader: Iterable[Any] | None, device: torch.device, every: Callable[[], None]
    ) -> Features:
        """All features; `every` is called after each batch.

        Raises:
            NotCached: They cannot be kept.
        """
        found = self.features
        once = iter(iterate(loader)) is loader
        loader = in_order(loader)
        watched = self.draws is None and self.epochs > 1 and not once
        self.digests = set() if watched else None
        with torch.no_grad():
            rows = self._draw(0, loader, device, every)
            if rows == 0:
                raise empty_loader("the training loader")
            found.rows = rows
            draws = self.draws or (self._passes(loader, device) if watched else 1)
            self.digests = None
            size = max(found.cache.in_memory + found.cache.on_disk, 1)
            while draws > 1 and not found.cache.room_for(size * (draws - 1)):
                draws -= 1
            if self.draws and draws < self.draws:
                found.notes.append(f"features of {draws} passes are kept: there is no room for more")
            aligned = True
            labels = [b.labels for b in found.blocks]
            for draw in range(1, draws):
                start = len(found.blocks)
                same = self._draw(draw, loader, device, every) == rows
                aligned = aligned and same and _equal(labels, [b.labels for b in found.blocks[start:]])
            found.draws = draws
            if not aligned:
                found.notes.append(
                    "passes over the data differ in order: rows that were held out may be among the rows of another pass; "
                    "pass val_loader= to choose on rows of its own"
                )
            if val_loader is not None:
                if self._draw(0, val_loader, device, every, validation=True) == 0:
                    raise empty_loader("val_loader")
        self._divide(val_loader is not None)
        if not any(len(b.train) for b in found.blocks):
            raise no_labels("the training loader")
        if val_loader is not None and not found.held_rows:
            raise no_labels("val_loader")
        return found

    def _passes(self, loader: Iterable[Any], device: torch.device) -> int:
        """`epochs` where a second pass over the loader begins with rows that were not in the first, else 1."""
        assert self.digests is not None
        reseed(self.seed, 1, 0, loader)
        for batch in batches(loader, device):
            digests = self._digests(self.fast.flatten(batch.args, batch.kwargs))
            new = sum(d not in self.digests for d in digests)
            if new <= ALL_NEW * len(digests):
                return 1
            self.features.notes.append(f"the data change from pass to pass: drawn {self.epochs} times")
            return self.epochs
        return 1

    def _draw(
        self, draw: int, loader: Iterable[Any], device: torch.device, every: Callable[[], None], validation: bool = False
    ) -> int:
        """Adds one pass over a loader; gives its number of rows."""
        if not validation:
            reseed(self.seed, draw, 0, loader)
        rows = 0
        for batch in batches(loader, device):
            rows += self._add(batch, rows, validation, length_of(loader))
            every()
        self._flush(validation)
        return rows

    def _add(self, batch: Batch, start: int, validation: bool, length: int | None) -> int:
        flat = self.fast.flatten(batch.args, batch.kwargs)
        if self.digests is not None and not validation:
            self.digests.update(self._digests(flat))
        values = dict(zip(self.at, self.trunk(*flat), strict=True))
        model = values[MODEL]
        rows = int(model.shape[0])
        self.objective.of_one(model.float(), model, batch.labels, batch.where)  # says what is wrong with the labels
        labels = tree_of_rows(batch.labels, rows)
        at = torch.arange(start, start + rows)
        kept: dict[str, Tensor] = {MODEL: model}
        for slot in self.features.slots:
            for read in slot.reads:
                kept[slot.key(read)] = self._read(slot, read, values)
            if slot.mask:
                kept[slot.key("mask")] = values[slot.exit.mask_input or ""]
        if self.classes and labels is not None:
            labels = check_labels(model, labels, batch.where).cpu()
        if self.classes and model.ndim == 3:  # one row for each position that has a label
            real = torch.ones(model.shape[:2], dtype=torch.bool) if labels is None else labelled(model, labels)
            at = at.unsqueeze(1).expand(real.shape)[real.cpu()]
            kept = {name: value[real] for name, value in kept.items()}
            labels = None if labels is None else labels[real]
        elif self.classes and labels is not None:
            real = labelled(model, labels)
            kept, labels, at = {n: v[real] for n, v in kept.items()}, labels[real], at[real.cpu()]
        for name, value in kept.items():
            scores = name == MODEL or name.endswith((".logits", ".shared"))  # of a class that is ruled out, -inf
            if bool(value.isnan().any() if scores else not value.isfinite().all()):
                raise EecompileError(
                    "the loss is not finite",
                    where=f"{batch.where}: {'the output of the model' if name == MODEL else name}",
                    got="NaN or infinity for some row, before any head is fitted",
                    wanted="a finite number",
                    hint="look at the inputs of this batch",
                )
        if batch.index == 0 and not validation and start == 0:
            self._fits(kept, length)
        self._keep(kept, labels, at, validation)
        return rows

    def _read(self, slot: Slot, read: str, values: Mapping[str, Tensor]) -> Tensor:
        h = values[slot.exit.head_inputs[0]]
        inputs = [values[n] for n in slot.exit.head_inputs]
        head = slot.branch.head
        if read == "logits":
            out = slot.branch.head(*inputs) if slot.branch.takes_mask else slot.branch.head(h)
            logits: Tensor = out[0] if isinstance(out, tuple) else out
            return logits
        if read == "shared":
            assert slot.tail is not None
            shared: Tensor = slot.tail(h)[0]
            return shared
        if read == "all":
            return h.movedim(slot.axis, 0)
        assert isinstance(head, Head)
        mask = values[slot.exit.mask_input] if slot.exit.mask_input else None
        if read == "first":
            return head.site.sequence(h)[:, 0]
        return head.site.sequence(h) if head.site.positions else head.pooled(h, mask)

    def _fits(self, kept: Mapping[str, Tensor], length: int | None) -> None:
        """Whether a pass over the data will fit; whole values that a choice alone asks for are left out where not."""
        passes = (length or 1) * (self.draws or 1)
        cache, slots = self.features.cache, self.features.slots
        size = {name: v.numel() * v.element_size() * passes for name, v in kept.items()}
        total = sum(size.values())
        for slot in slots:
            if "all" in slot.reads and len(slot.reads) > 1 and not cache.room_for(total):
                whole = size[slot.key("all")] + size.get(slot.key("mask"), 0)
                total -= whole
                slot.reads = tuple(r for r in slot.reads if r != "all")
                slot.mask = False
                self.features.notes.append(
                    f"{slot.exit.name}: heads that read all of the value were not tried: {whole / 2**20:.0f} MiB of features"
                )
        if not cache.room_for(total):
            raise NotCached(f"features of {total / 2**20:.0f} MiB fit neither in memory nor on the disk")

    def _keep(self, kept: Mapping[str, Tensor], labels: Any, at: Tensor, validation: bool) -> None:
        wanted = {MODEL} | {s.key(r) for s in self.features.slots for r in (*s.reads, *(("mask",) if s.mask else ()))}
        if any(p and p[0].shape[1:] != kept[n].shape[1:] for n, p in self.pending.items() if n in wanted):
            self._flush(validation)
        for name in wanted:
            self.pending.setdefault(name, []).append(kept[name].detach())
        self.pending_labels.append(labels)
        self.pending_rows.append(at)
        held = sum(t.numel() * t.element_size() for p in self.pending.values() for t in p)
        if sum(map(len, self.pending_rows)) >= BLOCK or held >= BLOCK_BYTES:
            self._flush(validation)

    def _flush(self, validation: bool) -> None:
        if not self.pending_rows:
            return
        index = len(self.features.blocks)
        for name, values in self.pending.items():
            self.features.cache.add(name, torch.cat(values))
        labels = cat_rows(self.pending_labels)
        self.features.blocks.append(Block(index, labels, torch.cat(self.pending_rows), validation))
        self.pending.clear()
        self.pending_labels, self.pending_rows = [], []

    def _divide(self, validated: bool) -> None:
        """Says which rows are fitted to and which are held out."""
        found = self.features
        out = torch.zeros(found.rows, dtype=torch.bool)
        if not validated and found.rows >= LEAST_TO_CHOOSE:
            order = torch.randperm(found.rows, generator=torch.Generator().manual_seed(self.seed))
            out[order[: round(HELD_OUT * found.rows)]] = True
        for block in found.blocks:
            held = torch.ones(len(block.row), dtype=torch.bool) if block.validation else out[block.row]
            block.held, block.train = held.nonzero().flatten(), (~held).nonzero().flatten()

    def _digests(self, flat: Sequence[Tensor]) -> list[int]:
        """A number for each row's inputs; padding, where a mask says what that is, does not count."""
        program = self.fast.program
        names = [n.name for n in facts.placeholders(self.trunk)]
        masks = {s.exit.mask_input for s in self.features.slots if s.exit.mask_input}
        axes = [leaf.batch_axis for leaf in program.signature.inputs]
        found = next((flat[names.index(m)] for m in sorted(masks)), None)
        rows = [(t.movedim(a, 0) if a is not None else None) for t, a in zip(flat, axes, strict=True)]
        count = next(len(r) for r in rows if r is not None)
        digests = []
        for i in range(count):
            parts = []
            for r in rows:
                if r is None:
                    continue
                value = r[i]
                if found is not None and value.shape[:1] == found.shape[1:]:
                    value = value[found[i] != 0]
                parts.append(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
            digests.append(hash(tuple(parts)))
        return digests


def shared_tail(fast: CompiledModule) -> Tail | None:
    """The model's own final layers as a head; None where there are none, or they read more than the value at an exit."""
    program = fast.program
    assert program.prediction.index is not None  # there are exits
    output = program.prediction_leaf
    if program.capture.front_end != "export" or program.capture.models or output.batch_axis != 0:
        return None
    trunk, _ = trunk_graph(fast, ())
    (model,) = facts.output_leaves(trunk)
    trunk.graph.output_node().args = ((model,) * (program.prediction.index + 1),)
    tail = sites.shared_tail(program.replace(graph_module=trunk))
    return tail if isinstance(tail, Tail) and not tail.sides else None


def trunk_graph(fast: CompiledModule, slots: Sequence[Slot]) -> tuple[fx.GraphModule, tuple[str, ...]]:
    """The graph up to what the heads read and the model's own output, and the names of what it gives."""
    marked, program = fast.graph_module, fast.program
    leaves, names = facts.output_leaves(marked), facts.by_name(marked)
    model = leaves[len(program.signature.outputs) + 2 + len(program.exits)]
    wanted = list(dict.fromkeys(n for s in slots for n in (*s.exit.head_inputs, *_mask(s))))
    return facts.graph_of(marked, [*(names[n] for n in wanted), model]), (*wanted, MODEL)


def _mask(slot: Slot) -> tuple[str, ...]:
    return (slot.exit.mask_input,) if slot.exit.mask_input else ()


def in_order(loader: Iterable[Any]) -> Iterable[Any]:
    """A loader that shuffles, without its shuffling: rows have the same places in every pass."""
    if type(loader) is not DataLoader or type(loader.batch_sampler) is not BatchSampler:
        return loader
    sampler = loader.sampler
    if type(sampler) is not RandomSampler or sampler.replacement or sampler.num_samples != len(loader.dataset):  # type: ignore[arg-type]
        return loader
    return DataLoader(
        loader.dataset,
        batch_sampler=BatchSampler(SequentialSampler(loader.dataset), loader.batch_size or 1, drop_last=False),  # type: ignore[arg-type]
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        prefetch_factor=loader.prefetch_factor,
    )


def tree_of_rows(labels: Any, rows: int) -> Any:
    """Labels as tensors with the rows first.

    Raises:
        NotCached: They are something else.
    """
    if labels is None:
        return None
    if isinstance(labels, (list, tuple)) and labels and isinstance(labels[0], (int, float)):
        labels = torch.tensor(labels)
    leaves, _ = tree_flatten(labels)
    if any(not isinstance(t, Tensor) or t.ndim == 0 or t.shape[0] != rows for t in leaves):
        raise NotCached("the labels are not tensors with one row for each input")
    return tree_map(lambda t: t.detach().cpu(), labels)


def cat_rows(labels: Sequence[Any]) -> Any:
    """Labels of several batches as those of one.

    Raises:
        NotCached: Their shapes differ.
    """
    if labels[0] is None:
        return None
    flat, spec = zip(*(tree_flatten(one) for one in labels), strict=True)
    if any(s != spec[0] for s in spec) or any(
        a.shape[1:] != b.shape[1:] for leaves in flat for a, b in zip(leaves, flat[0], strict=True)
    ):
        raise NotCached("the labels of batches have different shapes")
    return tree_unflatten([torch.cat(column) for column in zip(*flat, strict=True)], spec[0])


def _equal(first: Sequence[Any], second: Sequence[Any]) -> bool:
    """Whether two passes gave the same labels in the same order; not known without labels."""
    a, b = (list(chain.from_iterable(tree_flatten(x)[0] for x in part)) for part in (first, second))
    return bool(a) and len(a) == len(b) and all(x.shape == y.shape and torch.equal(x, y) for x, y in zip(a, b, strict=True))
