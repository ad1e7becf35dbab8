"""In-place operators that would overwrite a value that something else still reads become functional."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx


def functional(target: Any) -> Any:
    """The functional form of an in-place aten operator, None if it is none or has none."""
    if not isinstance(target, torch._ops.OpOverload) or not target._schema.name.endswith("_"):
        return None
    packet, overload = target._schema.name.removeprefix("aten::")[:-1], target._overloadname
    found = getattr(torch.ops.aten, packet, None)
    return getattr(found, overload, None) if found is not None and overload in found.overloads() else None


def make_functional(read: fx.Node, position: Mapping[fx.Node, int], after: int = -1) -> int:
    """Makes in-place users of `read` after a position functional; returns how many there were.

    What reads the value after such a user reads the user's result from now on, as it did in memory before. Nodes
    that `position` does not know keep what they read.
    """
    count = 0
    for user in sorted(read.users, key=lambda u: position.get(u, -1)):
        if position.get(user, -1) <= after or user.op != "call_function":
            continue
        plain = functional(user.target)
        if plain is not None and user.args and user.args[0] is read:
            user.target = plain
            read.replace_all_uses_with(
                user,
                delete_user_cb=lambda u, at=position[user]: position.get(u, -1) > at,  # type: ignore[misc]
            )
            count += 1
    return count
