"""The light draft head: norm, a low-rank projection, scores of the most frequent tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from rich.console import RenderableType
from torch import Tensor, nn
from torch.nn import functional

import eecompile.ops  # noqa: F401 (registers the operator)
from eecompile.errors import StrategyError
from eecompile.language.split import own_forward, shadow
from eecompile.training.checkpoint import Checkpoints, resumed
from eecompile.training.report import Report, json_safe
from eecompile.training.state import decode, encode

PATIENCE = 3
HELD_OUT = 0.1


class DraftHead(nn.Module):
    """Logits of the draft vocabulary from hidden states at the exit.

    Args:
        width: Size of the hidden states.
        vocabulary: [V'] int64; ids of the tokens that it can draft.
        rank: Size between its two projections, 0 for a single one.
    """

    vocabulary: Tensor

    def __init__(self, width: int, vocabulary: Tensor, rank: int = 0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.down = nn.Linear(width, rank, bias=False) if rank else nn.Identity()
        self.up = nn.Linear(rank or width, vocabulary.numel(), bias=False)
        self.register_buffer("vocabulary", vocabulary)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., D] to [..., V']"""
        logits: Tensor = self.up(self.down(self.norm(hidden)))
        return logits

    def best(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The likeliest token [n] of hidden states [n, D] and its probability [n]; on CUDA by the kernel of a large
        vocabulary, which writes no logits.
        """
        if not hidden.is_cuda:
            sure, best = self(hidden).softmax(-1).max(-1)
            return self.vocabulary[best], sure
        down = self.down(self.norm(hidden))
        one = torch.ones((), device=hidden.device)
        sure, best, _ = torch.ops.eecompile.head_confidence(down, self.up.weight, None, one)
        return self.vocabulary.index_select(0, best.clamp(min=0)), sure


@dataclass(frozen=True)
class DraftFit:
    """How a draft head is fitted; see `CompiledDecoder.fit`."""

    vocabulary: int
    rank: int
    epochs: int
    lr: float
    seed: int


@dataclass
class DraftFitReport(Report):
    """What fitting the draft head gave.

    Attributes:
        tokens: Number of positions it was fitted on, and on which it was measured.
        epochs: Passes over the kept hidden states.
        vocabulary: Number of tokens that can be drafted.
        coverage: Share of the model's own choices that are in the draft vocabulary.
        agreement: Share of held-out positions at which the head gives the model's own next token.
    """

    tokens: tuple[int, int]
    epochs: int
    vocabulary: int
    coverage: float
    agreement: float

    title: ClassVar[str] = "Draft head"

    def to_dict(self) -> dict[str, Any]:
        return {**json_safe(self.__dict__)}

    def __rich__(self) -> RenderableType:
        return (
            f"Draft head over {self.vocabulary:,} tokens ({self.coverage:.1%} of the model's choices): gives the model's "
            f"own token at {self.agreement:.1%} of {self.tokens[1]:,} held-out positions, after {self.epochs} epochs"
        )


def text_batches(loader: Iterable[Any], vocabulary: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Ids and attention mask, both [B, S], of each batch: a tensor of ids, a dict of a tokenizer, or either with labels.

    Args:
        vocabulary: Number of token ids that the model knows.

    Raises:
        StrategyError: The loader is none, or a batch holds no token ids of this model.
    """
    wanted = "batches of input_ids [B, S] int64, or dicts with input_ids and attention_mask"
    if isinstance(loader, str | bytes | Mapping) or not isinstance(loader, Iterable):
        raise StrategyError("this is no loader of text", got=type(loader).__name__, wanted=wanted)
    for index, batch in enumerate(loader):
        inputs = batch[0] if isinstance(batch, tuple | list) and batch else batch
        ids = inputs if isinstance(inputs, Tensor) else inputs.get("input_ids") if hasattr(inputs, "get") else None
        where = f"batch {index} of the loader"
        if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point() or not ids.numel():
            got = (
                f"{ids.dtype} {list(ids.shape)}"
                if isinstance(ids, Tensor)
                else type(inputs if ids is None else ids).__name__
            )
            raise StrategyError("a batch of text holds token ids", where=where, got=got, wanted=wanted)
        if not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
            raise StrategyError(
                "these token ids are not the model's",
                where=where,
                got=f"{int(ids.min())} to {int(ids.max())}",
                wanted=f"0 to {vocabulary - 1}",
                hint="use the model's own tokenizer",
            )
        mask = None if isinstance(inputs, Tensor) else inputs.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask
        if not isinstance(mask, Tensor) or mask.shape != ids.shape or not bool(mask.any(1).all()):
            got = str(list(mask.shape)) if isinstance(mask, Tensor) else type(mask).__name__
            raise StrategyError(
                "attention_mask= says which tokens are real, one in each row at least",
                where=where,
                got=got,
                wanted=list(ids.shape),
            )
        yield ids, mask


def vocabulary_of(model: nn.Module) -> int:
    """Number of token ids that a model of transformers knows."""
    found: int = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    return found


@torch.no_grad()
def gathered(model: nn.Module, blocks: str, exit: int, loader: Iterable[Any], most: int) -> tuple[Tensor, Tensor]:
    """Hidden states `[N, D]` at the exit and the model's own next token `[N]` at every real position, up to `most`."""
    states, choices, count = [], [], 0
    captured: list[Tensor] = []

    def watching(twin: nn.Module) -> Any:
        forward = own_forward(twin)

        def watch(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            captured.append(hidden_states)
            return forward(hidden_states, *args, **kwargs)

        return watch

    twin = shadow(model, {f"{blocks}.{exit}": watching})
    for ids, mask in text_batches(loader, vocabulary_of(model)):
        captured.clear()
        logits = twin(input_ids=ids, attention_mask=mask, use_cache=False).logits
        real = mask.bool()
        states.append(captured[0][real].float())
        choices.append(logits[real].argmax(-1))
        count += int(real.sum())
        if count >= most:
            break
    if not states:
        raise StrategyError("the loader gave no batch", wanted="batches of token ids")
    return torch.cat(states)[:most], torch.cat(choices)[:most]


def fit_draft_head(
    states: Tensor,
    choices: Tensor,
    options: DraftFit,
    checkpoints: Checkpoints | None = None,
    resume: bool | str = True,
) -> tuple[DraftHead, DraftFitReport]:
    """A draft head for hidden states `[N, D]` and the model's choices `[N]`, with early stopping on held-out positions.

    Args:
        checkpoints: Where one goes after every epoch; None: none are written.
        resume: As for `CompiledModule.fit`.
    """
    counts = torch.bincount(choices)
    kept = counts.argsort(descending=True, stable=True)[: min(options.vocabulary, int((counts > 0).sum()))].sort().values
    place = torch.full((counts.numel(),), -1, device=states.device)
    place[kept] = torch.arange(kept.numel(), device=states.device)
    targets = place[choices]
    generator = torch.Generator().manual_seed(options.seed)
    order = torch.randperm(len(states), generator=generator).to(states.device)
    held = order[: max(1, int(HELD_OUT * len(order)))]
    train = order[len(held) :]
    train = train[targets[train] >= 0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        head = DraftHead(states.shape[1], kept, options.rank).to(states.device)
    optimizer = torch.optim.AdamW(head.parameters(), lr=options.lr, weight_decay=0.01)
    best_state, at = head.state_dict(), {"epoch": 0, "waited": 0, "best": -1.0}
    asked = {**asdict(options), "epochs": None, "positions": len(states), "choices": int(choices.sum())}
    found = None if checkpoints is None else resumed(checkpoints, resume, asked, StrategyError)
    if found is not None:
        saved = {name: decode(found[0][name], found[1]) for name in ("head", "best", "at", "random", "optimizer")}
        head.load_state_dict(saved["head"])
        optimizer.load_state_dict(saved["optimizer"])
        generator.set_state(saved["random"])
        best_state, at = saved["best"], saved["at"]
    while at["epoch"] < options.epochs and at["waited"] < PATIENCE:
        for part in train[torch.randperm(len(train), generator=generator)].split(256):  # type: ignore[no-untyped-call]
            optimizer.zero_grad()
            functional.cross_entropy(head(states[part]), targets[part]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        with torch.no_grad():
            agreement = float((head(states[held]).argmax(-1) == targets[held]).float().mean())
        better = agreement > at["best"]
        if better:
            best_state = {k: v.clone() for k, v in head.state_dict().items()}
        at = {
            "epoch": at["epoch"] + 1,
            "waited": 0 if better else at["waited"] + 1,
            "best": max(agreement, at["best"]),
        }
        if checkpoints is not None:
            tensors: dict[str, Tensor] = {}
            parts = {"head": head.state_dict(), "best": best_state, "at": at, "random": generator.get_state()}
            parts["optimizer"] = optimizer.state_dict()
            state = {name: encode(part, tensors, name) for name, part in parts.items()}
            checkpoints.save(int(at["epoch"]), int(at["epoch"]), {"settings": asked, **state}, tensors)
    head.load_state_dict(best_state)
    coverage = float((targets >= 0).float().mean())
    report = DraftFitReport((len(train), len(held)), int(at["epoch"]), kept.numel(), coverage, at["best"])
    return head.eval(), report
