"""Self-speculative decoding: a language model drafts with its lower blocks and verifies with the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from eecompile.errors import StrategyError, check_name
from eecompile.ir.recipes import Recipe
from eecompile.strategies.base import Strategy

KV = ("verify", "deferred", "copy")
LONGEST_LOOKUP = 3


@dataclass(frozen=True)
class SelfSpeculative(Strategy):
    """Drafts tokens at an exit, verifies them with the rest of the model.

    Args:
        exit: Number of blocks of the lower part; None for a third of them, until `calibrate` measures.
        threshold: Probability that the draft head must give a token; a draft ends at the first one below.
        max_draft: Most tokens drafted before the upper part runs.
        draft_vocab: Number of tokens that a trained draft head can give, the most frequent ones.
        lookup: Longest n-gram of the text before that prompt lookup searches for; 0 for no lookup, None for 3 with
            `kv="verify"`. Its tokens have no probability, so they are drafted only where they are verified.
        kv: "verify" keeps what the model itself would have chosen: lossless. "deferred" keeps every drafted token; the cache
            is exact, the text may be another one. "copy" also skips the upper part of these tokens: its keys and values are
            those of the hidden states at the exit (CALM, Schuster et al. 2022, arXiv:2207.07061).
    """

    name: ClassVar[str] = "self_speculative"
    summary: ClassVar[str] = "an exit in a causal language model that drafts tokens, verified by the rest of the model"
    paper: ClassVar[str] = (
        "LayerSkip, Elhoushi et al. 2024, arXiv:2404.16710; Draft & Verify, Zhang et al. 2024, arXiv:2309.08168"
    )

    exit: int | None = None
    threshold: float = 0.6
    max_draft: int = 6
    draft_vocab: int = 8192
    lookup: int | None = None
    kv: str = "verify"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_name("kv=", self.kv, KV, StrategyError)
        for name, least in (("max_draft", 1), ("draft_vocab", 1), ("lookup", 0)):
            value = getattr(self, name)
            if value is None and name == "lookup":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise StrategyError(f"{name}= is a whole number", got=repr(value), wanted=f"at least {least}")
        if self.kv != "verify" and self.lookup:
            raise StrategyError(
                "prompt lookup gives tokens without a probability, which must be verified",
                got=f"lookup={self.lookup} with kv={self.kv!r}",
                wanted='lookup=0, or kv="verify"',
            )
        if not self.threshold >= 0:
            raise StrategyError("threshold= is 0 or more", got=self.threshold)

    @property
    def longest_lookup(self) -> int:
        """The n-gram that is searched for, 0 for no lookup."""
        default = LONGEST_LOOKUP if self.kv == "verify" else 0
        return default if self.lookup is None else self.lookup

    def __add__(self, other: Strategy) -> Strategy:
        raise StrategyError("self_speculative does not combine with other strategies", got=f"{self.name} + {other.name}")

    def recipe(self) -> Recipe:
        raise StrategyError(
            "self_speculative splits a decoder and inserts nothing into a graph", wanted="a causal language model"
        )

    @property
    def objective(self) -> dict[str, Any]:
        return {"name": "next_token"}
