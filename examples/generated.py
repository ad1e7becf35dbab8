"""Data that are generated, with a structure that is known: control charts, code whose words are to be tagged, and the tasks
of Graves 2016, whose rows differ in how many steps of thought they need.

Every row is drawn anew from the seed, so there are as many as one asks for and nothing is fetched.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

SIZES = {"train": 12_000, "val": 3_000, "test": 6_000}
SIZES_QUICK = {"train": 512, "val": 256, "test": 256}
IGNORE = -100  # label of padding


def data(
    draw: Callable[[int, int], tuple[Tensor, Tensor]], quick: bool
) -> Callable[[str, int | None], tuple[Tensor, Tensor]]:
    """The parts of a generated set, as `trunk` wants them: inputs and labels of N rows."""

    def part(name: str, limit: int | None) -> tuple[Tensor, Tensor]:
        sizes = SIZES_QUICK if quick else SIZES
        return draw(limit or sizes[name], list(sizes).index(name))

    return part


# ---- control charts

CHARTS = ("normal", "cyclic", "rising", "falling", "shifted up", "shifted down")
LENGTH = 60


def control_charts(rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Readings of a process in one of six states (Alcock and Manolopoulos 1999): float32 [N, 1, 60], int64 [N].

    A constant with noise, and by state nothing more, a cycle, a trend or a shift at some moment. The noise is from half to
    two and a half times that of the paper, another for each row, so that rows differ in how hard they are.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(rows, 1, generator=generator)

    t = torch.arange(LENGTH, dtype=torch.float32).expand(rows, LENGTH)
    state = torch.randint(len(CHARTS), (rows,), generator=generator)
    noise = 2 * uniform(0.5, 2.5) * (6 * torch.rand(rows, LENGTH, generator=generator) - 3)
    cycle = uniform(10, 15) * torch.sin(2 * torch.pi * t / uniform(10, 15))
    trend = uniform(0.2, 0.5) * t
    shift = uniform(7.5, 20) * (t >= uniform(LENGTH / 3, 2 * LENGTH / 3))
    signals = torch.stack((torch.zeros_like(t), cycle, trend, -trend, shift, -shift), 1)
    readings = noise + signals[torch.arange(rows), state]
    return (readings / 10).unsqueeze(1), state


# ---- tasks whose difficulty is known

SIGNS, DIGITS, OPERATIONS = 8, 5, 6  # the most of a row
LOGIC = torch.tensor(
    [
        [0, 0, 0, 1],
        [0, 1, 1, 1],
        [0, 1, 1, 0],
        [1, 1, 1, 0],
        [1, 0, 0, 0],
        [1, 0, 0, 1],
        [1, 1, 0, 1],
        [1, 0, 1, 1],
        [0, 0, 1, 0],
        [0, 1, 0, 0],
    ]
)  # fmt: skip  by 2 p + q


def parity(rows: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Whether the number of ones is odd, among 1 to 8 signs of 1 or -1 at random places, 0 elsewhere.

    float32 [N, 8], int64 [N], and how many signs there are, int64 [N].
    """
    generator = torch.Generator().manual_seed(seed)
    count = torch.randint(1, SIGNS + 1, (rows,), generator=generator)
    used = torch.rand(rows, SIGNS, generator=generator).argsort(1) < count[:, None]
    ones = torch.randint(2, (rows, SIGNS), generator=generator)
    return (used * (2 * ones - 1)).float(), (used * ones).sum(1) % 2, count


def addition(rows: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """The last digit of the sum of 1 to 5 decimal digits: float32 [N, 50] (one-hot), int64 [N], and how many, int64 [N]."""
    generator = torch.Generator().manual_seed(seed)
    count = torch.randint(1, DIGITS + 1, (rows,), generator=generator)
    digits = torch.randint(10, (rows, DIGITS), generator=generator)
    used = torch.arange(DIGITS) < count[:, None]
    ones = torch.nn.functional.one_hot(digits, 10) * used[:, :, None]
    return ones.flatten(1).float(), (digits * used).sum(1) % 10, count


def logic(rows: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """What 1 to 6 operations come to, each of ten on the two last bits, the first two given.

    float32 [N, 62] (bits as 1 and -1, operations one-hot), int64 [N], and how many operations, int64 [N].
    """
    generator = torch.Generator().manual_seed(seed)
    count = torch.randint(1, OPERATIONS + 1, (rows,), generator=generator)
    bits = torch.randint(2, (rows, 2), generator=generator)
    names = torch.randint(len(LOGIC), (rows, OPERATIONS), generator=generator)
    used = torch.arange(OPERATIONS) < count[:, None]
    before, last = bits[:, 0], bits[:, 1]
    for k in range(OPERATIONS):
        new = LOGIC[names[:, k], 2 * before + last]
        before, last = torch.where(used[:, k], last, before), torch.where(used[:, k], new, last)
    ones = torch.nn.functional.one_hot(names, len(LOGIC)) * used[:, :, None]
    return torch.cat((2 * bits - 1, ones.flatten(1)), 1).float(), last, count


TASKS = {"parity": parity, "addition": addition, "logic": logic}


# ---- code

PAD, TOKENS = "", 48
NAMES = tuple("abcdefghijklmnop")
TAGS = (
    "keyword", "operator", "number", "function", "parameter", "variable", "ends if", "ends while", "ends def",
)  # fmt: skip
KEYWORDS, OPERATORS, NUMBERS = ("def", "if", "while", "end", "return", "do"), ("=", "+", "<", "(", ")"), tuple("0123456789")
VOCABULARY = (PAD, *KEYWORDS, *OPERATORS, *NUMBERS, *NAMES)


def _expression(rng: random.Random, names: list[tuple[str, str]], depth: int = 0) -> Iterator[tuple[str, str]]:
    kind = rng.random()
    if kind < 0.3 or depth > 2:
        yield rng.choice(NUMBERS), "number"
    elif kind < 0.75:
        yield rng.choice(names)
    elif kind < 0.87:
        yield rng.choice(NAMES), "function"
        yield "(", "operator"
        yield from _expression(rng, names, depth + 1)
        yield ")", "operator"
    else:
        yield from _expression(rng, names, depth + 1)
        yield rng.choice("+<"), "operator"
        yield from _expression(rng, names, depth + 1)


def _statement(rng: random.Random, names: list[tuple[str, str]], depth: int = 0) -> Iterator[tuple[str, str]]:
    kind = rng.random()
    if kind < 0.45 or depth > 2:
        name = rng.choice(names)
        yield name
        yield "=", "operator"
        yield from _expression(rng, names)
        return
    word = "if" if kind < 0.75 else "while"
    yield word, "keyword"
    yield from _expression(rng, names)
    yield "do", "keyword"
    for _ in range(rng.randint(1, 2)):
        yield from _statement(rng, names, depth + 1)
    yield "end", f"ends {word}"


def _program(rng: random.Random) -> Iterator[tuple[str, str]]:
    while True:
        parameters = rng.sample(NAMES, rng.randint(1, 2))
        names = [(name, "parameter" if name in parameters else "variable") for name in NAMES if rng.random() < 0.4]
        names += [(name, "parameter") for name in parameters if (name, "parameter") not in names]
        yield "def", "keyword"
        yield rng.choice(NAMES), "function"
        yield "(", "operator"
        yield from ((name, "parameter") for name in parameters)
        yield ")", "operator"
        for _ in range(rng.randint(1, 3)):
            yield from _statement(rng, names)
        yield "return", "keyword"
        yield from _expression(rng, names)
        yield "end", "ends def"


def code(rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Programs of a small language and the role of each word: int64 [N, 48] and [N, 48], `IGNORE` where nothing is.

    Some roles are plain from the word ("while" is a keyword), some from its neighbours (a name before a bracket is a
    function), some from far away: a name is a parameter where the definition around it says so, and an "end" ends what
    the blocks inside have left open.
    """
    rng = random.Random(seed)
    word_index, tag_index = ({word: i for i, word in enumerate(words)} for words in (VOCABULARY, TAGS))
    words = torch.zeros(rows, TOKENS, dtype=torch.int64)
    tags = torch.full((rows, TOKENS), IGNORE)
    for row in range(rows):
        for at, (word, tag) in zip(range(rng.randint(TOKENS // 2, TOKENS)), _program(rng), strict=False):
            words[row, at], tags[row, at] = word_index[word], tag_index[tag]
    return words, tags
