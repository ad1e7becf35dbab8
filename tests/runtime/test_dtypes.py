"""Inputs of other dtypes than captured: converted where the model answers the same, refused where it does not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from eecompile import CaptureError, CompiledModule, eecompile, load, strategies
from tests.capture.nets import CLASSES, WIDTH, Block
from tests.support import equal_bits

IDS = torch.arange(24).view(4, 6) % 11
MASK = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0]])


class Text(nn.Module):
    """Token ids and a mask [B, S] to [B, 3]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.out = nn.Linear(WIDTH, CLASSES)

    def weights(self, mask: Tensor) -> Tensor:
        return mask.to(self.out.weight.dtype)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.out((x * self.weights(mask)[..., None]).mean(1))


class Added(Text):
    """A float mask is added to the scores, any other one says what to keep: what attention in torch does."""

    def weights(self, mask: Tensor) -> Tensor:
        scores = torch.zeros(mask.shape)
        scores = scores + mask if mask.is_floating_point() else scores.masked_fill(mask == 0, -1e9)
        return scores.softmax(-1)


class Inverted(Text):
    """`~mask` of integers is -2 and -1."""

    def weights(self, mask: Tensor) -> Tensor:
        return (~mask).float()


def made(kind: type[Text]) -> tuple[Text, CompiledModule]:
    model = kind().eval()
    fast = eecompile(model, strategies.Branchy(exits=1), example_kwargs={"ids": IDS, "mask": MASK})
    fast.set_thresholds(2.0)
    return model, fast


@pytest.fixture(scope="module")
def text() -> tuple[Text, CompiledModule]:
    return made(Text)


@pytest.mark.parametrize("ids", [torch.int64, torch.int32])
@pytest.mark.parametrize("mask", [torch.int64, torch.int32, torch.uint8, torch.bool, torch.float32, torch.float64])
def test_the_model_takes_them_so_the_compiled_module_does(text, ids, mask):
    model, fast = text
    with torch.no_grad():
        for n in (3, 2):
            given = {"ids": IDS[:n].to(ids), "mask": MASK[:n].to(mask)}
            for call in (fast, fast.full, lambda **k: fast.run(**k).output):
                equal_bits(call(**given), model(**given))


@pytest.mark.parametrize(
    ("ids", "mask"),
    [
        (IDS.float(), MASK),  # the model refuses it
        (IDS, MASK * 0.5),  # not an integer
        (IDS, torch.where(MASK == 1, float("nan"), 0.0)),
    ],
)
def test_values_that_would_change_and_what_the_model_refuses(text, ids, mask):
    with pytest.raises(CaptureError, match="does not fit the captured graph"):
        text[1](ids, mask)


@pytest.mark.parametrize(("kind", "dtype"), [(Added, torch.float32), (Inverted, torch.bool)])
def test_where_the_dtype_has_a_meaning_the_call_is_refused(kind, dtype):
    model, fast = made(kind)
    for mask in (MASK, torch.ones_like(MASK), MASK):
        with torch.no_grad():
            same = torch.allclose(model(IDS, mask), model(IDS, mask.to(dtype)))
            if same:
                equal_bits(fast(IDS, mask.to(dtype)), fast(IDS, mask))
                continue
            with pytest.raises(CaptureError, match="where:  mask"):
                fast(IDS, mask.to(dtype))


def test_a_mask_of_ones_proves_nothing_about_the_next_one():
    _, fast = made(Added)
    with torch.no_grad():
        fast(IDS, torch.ones(4, 6))
        with pytest.raises(CaptureError, match="where:  mask"):
            fast(IDS, MASK.float())


def test_a_loaded_program_converts_nothing(text, tmp_path):
    text[1].save(tmp_path / "saved")
    with pytest.raises(CaptureError, match="convert the input"):
        load(tmp_path / "saved")(IDS.int(), MASK)
