"""One generation: draft with the lower part, verify with the upper part, row by row at its own pace.

Every round, each row that goes on has one token whose lower part has not run yet. The lower part runs on it, a draft head
proposes the next token, and so on while the head is sure and the queue of hidden states is shorter than `max_draft`. Then
the upper part runs once over the queue. Of what was drafted the longest prefix is kept that the model itself would have
chosen, and one token more, which the upper part has given (Leviathan et al. 2023; Elhoushi et al. 2024). With
`kv="deferred"` drafted tokens are kept as they are, and the upper part completes the cache; with `kv="copy"` it is skipped
for them, and its keys and values are those of the hidden states at the exit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from eecompile.errors import StrategyError
from eecompile.language.cache import SlotCache, Slots
from eecompile.language.lookup import lookup
from eecompile.language.noise import gumbel
from eecompile.language.split import Split

# Two scores are a near-tie where they differ by less than so many roundings of the largest logit.
TIE, TIE_OF_HALF = 32, 4
# A drafter pauses in a row where a draft of it gives fewer tokens than it costs.
DRAFT_COST = 0.4  # until calibrate measures
LATEST, PAUSE = 0.3, 8  # the share of the newest draft in the mean; drafts that are left out in a pause


@dataclass(frozen=True)
class DraftOptions:
    """How tokens are drafted.

    Attributes:
        threshold: Probability that the draft head must give a token; above 1 nothing is drafted.
        max_draft: Most tokens that are drafted before the upper part runs.
        lookup: Longest n-gram that is looked for in the text before, as a second drafter; 0 for none.
        draft_cost: What a draft costs, in tokens of plain decoding.
        kv: "verify" keeps drafted tokens only where the model agrees; "deferred" and "copy" keep all.
    """

    threshold: float
    max_draft: int
    lookup: int
    draft_cost: float
    kv: str


@dataclass
class Counts:
    """What a generation did.

    Attributes:
        lower, upper, full: Number of passes of each part.
        drafted, accepted: Tokens of the draft head.
        looked_up, looked_up_accepted: Tokens of prompt lookup.
        ties: Tokens that a pass of one token decided, because two scores were nearly equal.
    """

    lower: int = 0
    upper: int = 0
    full: int = 0
    drafted: int = 0
    accepted: int = 0
    looked_up: int = 0
    looked_up_accepted: int = 0
    ties: int = 0


@dataclass
class Standing:
    """What a drafter gave in one row so far.

    Attributes:
        gain: Mean of the tokens that were kept of a draft, the latest drafts weighing most.
        pause: Drafts that are still left out.
    """

    gain: float = 1.0
    pause: int = 0

    def rests(self) -> bool:
        """Whether the draft that could begin now is left out."""
        resting = self.pause > 0
        self.pause -= resting
        return resting

    def learn(self, kept: int, cost: float) -> None:
        self.gain += LATEST * (kept - self.gain)
        self.pause = PAUSE if self.gain < cost else 0


@dataclass
class Row:
    """One sequence. The last id has not been through the model yet; all before it have.

    Attributes:
        ids: Token ids, padding on the left included.
        drafts: Tokens drafted after the last id, with whether prompt lookup gave each.
        sources: For each generated token: 0 the full model, 1 the draft head, 2 prompt lookup.
        head, lookup: How the draft head and prompt lookup do.
    """

    ids: list[int]
    done: bool = False
    drafts: list[tuple[int, bool]] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)
    head: Standing = field(default_factory=Standing)
    lookup: Standing = field(default_factory=Standing)
    scores: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class Choosing:
    """How a token is chosen from logits: what `generate` was asked for.

    Attributes:
        processor: transformers' `LogitsProcessorList`; `(ids [1, S], scores [1, V]) -> [1, V]`.
        stopping: transformers' `StoppingCriteriaList`.
        seed: Key of the noise for sampling, None for greedy decoding.
        keep_scores, keep_logits: Whether they are kept for the output.
        rows: Size of the batch.
    """

    processor: Callable[[Tensor, Tensor], Tensor]
    stopping: Callable[[Tensor, Any], Tensor]
    seed: int | None = None
    keep_scores: bool = False
    keep_logits: bool = False
    rows: int = 1

    @property
    def plain(self) -> bool:
        """Whether the token with the largest logit is taken, whatever the text."""
        return self.seed is None and not len(self.processor)  # type: ignore[arg-type]

    def scores(self, ids: Sequence[int], logits: Tensor, row: int) -> Tensor:
        """[V] float32: the logits after `ids`, processed as row `row` of the batch."""
        scores = logits.to(torch.float32, copy=True)
        if len(self.processor):  # type: ignore[arg-type]
            batch = self.batch(ids, logits.device)
            scores = self.processor(batch, scores.repeat(self.rows, 1))[row]
        return scores

    def stops(self, ids: Sequence[int], scores: Any, row: int, device: torch.device) -> bool:
        return bool(self.stopping(self.batch(ids, device), scores)[row])

    def batch(self, ids: Sequence[int], device: torch.device) -> Tensor:
        """Rows have lengths of their own, while processors and criteria may hold something for each row of the batch."""
        return torch.tensor([ids], device=device).expand(self.rows, -1)

    def noisy(self, scores: Tensor, row: int, position: int) -> Tensor:
        if self.seed is None:
            return scores
        return scores + gumbel(self.seed, row, position, scores.numel()).to(scores.device)


class Generation:
    """The state of one call of `generate`.

    Args:
        head: Logits of the draft head from ids [B, 1] and hidden states [B, 1, D], and its vocabulary.
        best: The likeliest tokens [B] and their probabilities from hidden states [B, D]: a shorter way for greedy decoding.
    """

    def __init__(
        self, split: Split, head: Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]], options: DraftOptions,
        choosing: Choosing, capacity: int | None, best: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None
    ) -> None:  # fmt: skip
        self.split, self.head, self.options, self.choosing, self.best = split, head, options, choosing, best
        self.longest = capacity
        self.cache = SlotCache(split.count, capacity)
        self.counts = Counts()
        self.rows: list[Row] = []

    def run(
        self, ids: Tensor, attention_mask: Tensor, before: Any = None, emit: Callable[[list[int]], None] | None = None
    ) -> list[Row]:
        """Generates until every row has stopped.

        Args:
            ids: [B, S] int64.
            attention_mask: [B, S]; 0 for padding, which is on the left.
            before: Cache of plain decoding that holds the first tokens of `ids`.
            emit: Called with the new tokens of a single row as they are accepted.
        """
        self.emit, self.device = emit, ids.device
        self.padding = attention_mask.argmax(1)
        self.rows = [Row(row) for row in ids.tolist()]
        self._prefill(ids, attention_mask, before)
        while any(not row.done for row in self.rows):
            self._round()
        return self.rows

    def _prefill(self, ids: Tensor, attention_mask: Tensor, before: Any) -> None:
        start = 0 if before is None else before.get_seq_length()
        if start >= ids.shape[1] or (start and any(layer.keys.shape[2] != start for layer in before.layers)):
            raise StrategyError(
                "past_key_values= must hold a beginning of the prompt, without its last token, in every layer",
                got=f"{start} of {ids.shape[1]} tokens",
            )
        if start:
            self.cache.load(before, start)
        batch, length = ids.shape
        index = torch.arange(start, length, device=self.device).expand(batch, -1)
        slots = Slots(index, self.padding, length, True)
        logits = self.split.prefill(ids[:, start:], slots, self.cache, attention_mask)
        self.counts.full += 1
        for b in range(batch):
            self._commit(b, self._choose(b, logits[b, -1]), 0)

    def finish(self, sequences: Tensor) -> Any:
        """The cache that plain decoding leaves: all tokens `[B, S]` but the last, those after a row's end included."""
        length = sequences.shape[1] - 1
        tokens = {b: sequences[b, len(row.ids) - 1 : length].tolist() for b, row in enumerate(self.rows)}
        tokens = {b: t for b, t in tokens.items() if t}
        if tokens:
            ids, slots = self._columns(tokens, {b: len(self.rows[b].ids) - 1 for b in tokens})
            self.split.full(ids, slots, self.cache)
        return self.cache.plain(length, getattr(self.split.model, "config", None))

    # ------------------------------------------------------------------ one round

    def _round(self) -> None:
        live = [b for b, row in enumerate(self.rows) if not row.done]
        for b in live:
            self.rows[b].drafts = self._looked_up(self.rows[b])
        queue: dict[int, list[Tensor]] = {b: [] for b in live}
        ready = self._lower({b: [self.rows[b].ids[-1], *(t for t, _ in self.rows[b].drafts)] for b in live}, queue)
        while ready:
            ready = self._lower({b: [self.rows[b].drafts[-1][0]] for b in ready}, queue)
        self._flush(queue)

    def _room(self, row: Row) -> int:
        """How many more tokens may be drafted now; none that would come after the longest text."""
        most = self.options.max_draft
        if self.longest is not None:
            given = 1 if self.options.kv == "verify" else 0  # by the upper part, when all drafts are kept
            most = min(most, self.longest - len(row.ids) - given)
        return most - len(row.drafts)

    def _goes_on(self, row: Row) -> bool:
        """Whether the draft head may add a token; it begins where all that is drafted comes from prompt lookup."""
        begins = not row.drafts or row.drafts[-1][1]
        return self._room(row) > 0 and not (begins and row.head.rests())

    def _looked_up(self, row: Row) -> list[tuple[int, bool]]:
        if not self.options.lookup:
            return []
        found = lookup(row.ids, self.options.lookup, self._room(row))
        if found and row.lookup.rests():
            return []
        self.counts.looked_up += len(found)
        return [(token, True) for token in found]

    def _lower(self, tokens: dict[int, list[int]], queue: dict[int, list[Tensor]]) -> list[int]:
        """Runs the lower part on each row's new tokens, drafts one more; gives the rows whose draft goes on."""
        starts = {b: len(self.rows[b].ids) - 1 + len(queue[b]) for b in tokens}
        ids, slots = self._columns(tokens, starts)
        hidden = self.split.lower(ids, slots, self.cache)
        self.counts.lower += 1
        for b, given in tokens.items():
            queue[b] += list(hidden[b, : len(given)].unbind(0))
        on = [b for b in tokens if self._overruled(b, queue[b])]
        going = [b for b in tokens if b not in on and self._goes_on(self.rows[b])]
        if not going or self.options.threshold > 1:
            return on
        last = torch.stack([queue[b][-1] for b in going])[:, None]  # [B', 1, D]
        for b, token in zip(going, self._proposed(going, ids[going, :1], last), strict=True):
            if token is not None:
                self.rows[b].drafts.append((token, False))
                self.counts.drafted += 1
                on.append(b)
        return on

    def _overruled(self, b: int, states: list[Tensor]) -> bool:
        """Ends a looked-up draft at the first token where the draft head is sure of another one, which takes its place;
        in rows where the draft head gives more than prompt lookup.
        """
        row = self.rows[b]
        looked_up = len(row.drafts) > 0 and row.drafts[-1][1]
        if self.best is None or not self.choosing.plain or not looked_up or row.head.gain <= row.lookup.gain:
            return False
        tokens, sure = self.best(torch.stack(states[:-1]).float())
        for j, (token, p) in enumerate(zip(tokens.tolist(), sure.tolist(), strict=True)):
            if p >= self.options.threshold and token != row.drafts[j][0]:
                row.drafts[j:] = [(token, False)]
                states[j + 1 :] = []
                self.counts.drafted += 1
                return True
        return False

    def _proposed(self, going: list[int], ids: Tensor, last: Tensor) -> list[int | None]:
        """A token for each of these rows, None where the draft head is not sure enough; `last` [B', 1, D]."""
        if self.best is not None and self.choosing.plain:
            tokens, sure = self.best(last[:, 0].float())
            pairs = zip(tokens.tolist(), sure.tolist(), strict=True)
            return [token if p >= self.options.threshold else None for token, p in pairs]  # NaN is never sure
        logits, vocabulary = self.head(ids, last)
        return [self._drafted(b, s, vocabulary) for b, s in zip(going, logits[:, 0].float(), strict=True)]

    def _drafted(self, b: int, scores: Tensor, vocabulary: Tensor | None) -> int | None:
        """The draft head's token, chosen as the model's own tokens are, None where it is not sure enough."""
        row = self.rows[b]
        if vocabulary is not None:
            scores = scores.new_full((self.vocabulary_size,), -torch.inf).index_copy_(0, vocabulary, scores)
        ids = [*row.ids, *(token for token, _ in row.drafts)]
        scores = self.choosing.scores(ids, scores, b)
        best = int(self.choosing.noisy(scores, b, len(ids)).argmax())
        sure = float((scores[best] - scores.logsumexp(0)).exp())
        return best if sure >= self.options.threshold else None  # NaN is never sure

    def _flush(self, queue: dict[int, list[Tensor]]) -> None:
        """The upper part over every row's queue; keeps what the model agrees with, and one token more."""
        copied = {b: len(queue[b]) - 1 for b in queue if self.options.kv == "copy" and len(queue[b]) > 1}
        if copied:
            self._upper(self.split.copy, {b: queue[b][:n] for b, n in copied.items()}, dict.fromkeys(copied, 0))
        skipped = {b: copied.get(b, 0) for b in queue}
        logits = self._upper(self.split.upper, {b: queue[b][n:] for b, n in skipped.items()}, skipped)
        self.counts.upper += 1
        for b in queue:
            self._accept(b, logits[b])

    def _upper(self, part: Callable[..., Any], states: dict[int, list[Tensor]], skipped: dict[int, int]) -> Any:
        """Runs a part on each row's hidden states `[D]`, those of its undecided tokens from number `skipped[b]` on."""
        tokens, starts = {}, {}
        for b, n in skipped.items():
            row = self.rows[b]
            tokens[b] = [row.ids[-1], *(token for token, _ in row.drafts)][n : n + len(states[b])]
            starts[b] = len(row.ids) - 1 + n
        ids, slots = self._columns(tokens, starts)
        some = next(iter(states.values()))[0]
        hidden = some.new_zeros((*ids.shape, some.shape[-1]))
        for b, lines in states.items():
            hidden[b, : len(lines)] = torch.stack(lines)
        return part(ids, hidden, slots, self.cache)

    def _accept(self, b: int, logits: Tensor) -> None:
        """Takes tokens from the logits `[Q, V]` of the row's undecided tokens; with "copy", of the last one alone."""
        row = self.rows[b]
        drafts, row.drafts = row.drafts, []
        kept_drafts, looked_up = 0, sum(looked_up for _, looked_up in drafts)  # those of prompt lookup come first
        copying = self.options.kv == "copy"
        for j in range(len(drafts) + 1):
            drafted = drafts[j] if j < len(drafts) else None
            if drafted is not None and self.options.kv != "verify":
                token, kept = drafted[0], True
                if not copying:
                    self._record(b, logits[j], None)
            else:
                token = self._choose(b, logits[0 if copying else j], checked=len(drafts) > 0 and not copying)
                kept = drafted is not None and token == drafted[0]
            source = 0 if not kept or drafted is None else 2 if drafted[1] else 1
            kept_drafts += source > 0
            self.counts.accepted += source == 1
            self.counts.looked_up_accepted += source == 2
            self._commit(b, token, source)
            if row.done or not kept:
                break
        if looked_up:
            row.lookup.learn(min(kept_drafts, looked_up), self.options.draft_cost)
        if looked_up <= kept_drafts and looked_up < len(drafts):
            row.head.learn(kept_drafts - looked_up, self.options.draft_cost)

    # ------------------------------------------------------------------ tokens

    def _record(self, b: int, logits: Tensor, scores: Tensor | None) -> None:
        """Keeps logits and scores of a token for the output, where they were asked for."""
        row = self.rows[b]
        if self.choosing.keep_logits:
            row.logits.append(logits.float())
        if self.choosing.keep_scores:
            row.scores.append(self.choosing.scores(row.ids, logits, b) if scores is None else scores)

    def _choose(self, b: int, logits: Tensor, checked: bool = False) -> int:
        """The model's own token after the row's ids; `checked` where logits [V] come from a pass of several tokens."""
        row = self.rows[b]
        self.vocabulary_size = logits.numel()
        scores = self.choosing.scores(row.ids, logits, b)
        noisy = self.choosing.noisy(scores, b, len(row.ids))
        if checked and _near_tie(noisy, logits):
            self.counts.ties += 1
            logits = self._one_token(b)
            scores = self.choosing.scores(row.ids, logits, b)
            noisy = self.choosing.noisy(scores, b, len(row.ids))
        self._record(b, logits, scores)
        return int(noisy.argmax())

    def _one_token(self, b: int) -> Tensor:
        """[V]: logits after the row's last id, computed as plain decoding does: the whole model on one token a row."""
        last = len(self.rows[b].ids) - 1
        ids, slots = self._columns({b: [self.rows[b].ids[-1]]}, {b: last})
        self.counts.full += 1
        return self.split.full(ids, slots, self.cache)[b, 0]

    def _commit(self, b: int, token: int, source: int) -> None:
        row = self.rows[b]
        row.ids.append(token)
        row.sources.append(source)
        if self.emit is not None:
            self.emit([token])
        scores = tuple(s[None] for s in row.scores) if self.choosing.keep_scores else None
        row.done = self.choosing.stops(row.ids, scores, b, self.device)

    def _columns(self, tokens: dict[int, list[int]], starts: dict[int, int]) -> tuple[Tensor, Slots]:
        """Ids `[B, Q]` and slots of each row's tokens, from its slot `starts[b]` on; rows without any have empty columns."""
        width = max(len(t) for t in tokens.values())
        ids, index = [], []
        for b in range(len(self.rows)):
            given = tokens.get(b, [])
            ids.append(given + [0] * (width - len(given)))
            index.append([starts[b] + i for i in range(len(given))] + [-1] * (width - len(given)))
        length = 1 + max(max(line) for line in index)
        together = all(line == index[0] for line in index) and -1 not in index[0]
        device = self.device
        return torch.tensor(ids, device=device), Slots(torch.tensor(index, device=device), self.padding, length, together)


def _near_tie(scores: Tensor, logits: Tensor) -> bool:
    """Whether rounding alone may decide between the two largest scores."""
    top = scores.topk(2).values
    half = logits.dtype in (torch.float16, torch.bfloat16)
    rounding = TIE_OF_HALF * torch.finfo(logits.dtype).eps if half else TIE * torch.finfo(torch.float32).eps
    return bool((top[0] - top[1]).abs() <= rounding * logits.abs().max())
