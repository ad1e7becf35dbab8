"""Prompt lookup: drafts the text that followed the last words the time before (Saxena 2023)."""

from __future__ import annotations

from collections.abc import Sequence

SHORTEST = 2


def lookup(ids: Sequence[int], longest: int, most: int) -> list[int]:
    """Up to `most` ids that followed the latest earlier place with the same last n-gram, the longest n-gram first."""
    for n in range(min(longest, len(ids) - 1), SHORTEST - 1, -1):
        last = list(ids[-n:])
        for start in range(len(ids) - n - 1, -1, -1):
            if list(ids[start : start + n]) == last:
                return list(ids[start + n : start + n + most])
    return []
