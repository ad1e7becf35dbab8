"""Generated data: the same from the same seed, with the structure that is said."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from examples import generated
from examples.generated import IGNORE, KEYWORDS, NAMES, NUMBERS, OPERATORS, TAGS, VOCABULARY


@pytest.mark.parametrize("draw", [generated.control_charts, generated.code])
def test_rows_are_drawn_from_the_seed(draw: Callable[[int, int], tuple[Tensor, Tensor]]) -> None:
    first, again, other = (draw(20, seed) for seed in (3, 3, 4))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])
    part = generated.data(draw, quick=True)
    assert len(part("val", None)[1]) == generated.SIZES_QUICK["val"]
    assert not torch.equal(part("val", 20)[0], part("test", 20)[0])


def test_control_charts_show_their_state() -> None:
    readings, state = generated.control_charts(3000)
    assert readings.shape == (3000, 1, generated.LENGTH) and readings.dtype == torch.float32
    moved = readings[:, 0, -20:].mean(1) - readings[:, 0, :20].mean(1)
    means = torch.stack([moved[state == k].mean() for k in range(len(generated.CHARTS))])
    assert means[[0, 1]].abs().max() < 0.3
    assert means[[2, 4]].min() > 0.7 and means[[3, 5]].max() < -0.7
    swing = readings[:, 0].std(1)
    assert swing[state == 1].mean() > swing[state == 0].mean() + 0.2


def test_words_of_code_have_their_roles() -> None:
    words, tags = generated.code(200)
    assert words.shape == tags.shape == (200, generated.TOKENS)
    assert ((words == 0) == (tags == IGNORE)).all()
    plain = {**dict.fromkeys(OPERATORS, "operator"), **dict.fromkeys(NUMBERS, "number")}
    plain |= dict.fromkeys(set(KEYWORDS) - {"end"}, "keyword")
    for row, labels in zip(words.tolist(), tags.tolist(), strict=True):
        said = [(VOCABULARY[w], TAGS[t]) for w, t in zip(row, labels, strict=True) if t != IGNORE]
        blocks: list[str] = []
        parameters: set[str] = set()
        header = False  # in the first line of a definition
        for (word, tag), (following, _) in zip(said, said[1:], strict=False):
            if word in ("def", "if", "while"):
                blocks.append(word)
            if word == "def":
                parameters, header = set(), True
            elif word == ")":
                header = False
            elif word == "end":
                assert tag == f"ends {blocks.pop()}"
            elif word in NAMES and following == "(":
                assert tag == "function"
            elif word in NAMES:
                parameters |= {word} if header else set()
                assert tag == ("parameter" if word in parameters else "variable")
            if word in plain:
                assert tag == plain[word]


def test_tasks_have_their_answers_and_their_difficulty() -> None:
    signs, odd, count = generated.parity(500)
    assert torch.equal((signs != 0).sum(1), count) and torch.equal((signs > 0).sum(1) % 2, odd)
    digits, last, count = generated.addition(500)
    ones = digits.view(500, generated.DIGITS, 10)
    assert torch.equal(ones.sum((1, 2)), count.float())
    assert torch.equal((ones * torch.arange(10)).sum((1, 2)).long() % 10, last)
    row, answer, count = generated.logic(500)
    assert torch.equal(row[:, 2:].sum(1), count.float())
    for given, wanted in zip(row[:50], answer[:50], strict=True):
        before, now = (int(b > 0) for b in given[:2])
        for one in given[2:].view(generated.OPERATIONS, -1):
            if one.any():
                before, now = now, int(generated.LOGIC[int(one.argmax()), 2 * before + now])
        assert now == int(wanted)
    for draw in generated.TASKS.values():
        assert all(torch.equal(a, b) for a, b in zip(draw(20, 3), draw(20, 3), strict=True))
        assert draw(4000)[2].float().std() > 1
