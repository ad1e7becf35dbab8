"""Heads by the shape of the value at the exit: what fits where, pooling without the padding, description and rebuilding."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

from eecompile.errors import StrategyError
from eecompile.heads import (
    HEADS,
    ONE_A_ROW,
    Branch,
    ConvHead,
    LinearHead,
    MLPHead,
    PoolerHead,
    Site,
    build_head,
    check_head,
    default_kind,
    describe,
    mean_over_positions,
    rebuild,
    score_head,
)

MAP = Site(("batch", 12, 16, 16), 0, 7)
SMALL_MAP = Site(("batch", 12, 2, 2), 0, 7)
SEQUENCE = Site(("batch", "seq", 12), 0, 7)
SECOND_AXIS = Site(("seq", "batch", 12), 1, 7)
CHANNELS_FIRST = Site(("batch", 12, "seq"), 0, 7, channels_first=True)
VECTOR = Site(("batch", 12), 0, 7)
VOLUME = Site(("batch", 3, 4, 4, 4), 0, 7)
PER_POSITION = Site(("batch", "seq", 12), 0, 7, positions=True)
SITES = {
    "map": MAP,
    "small map": SMALL_MAP,
    "sequence": SEQUENCE,
    "second axis": SECOND_AXIS,
    "channels first": CHANNELS_FIRST,
    "vector": VECTOR,
    "per position": PER_POSITION,
}


def value(site: Site, rows: int = 3, length: int = 5) -> Tensor:
    sizes = [s if isinstance(s, int) else length for s in site.sizes]
    sizes[site.batch_axis] = rows
    return torch.randn(sizes, generator=torch.Generator().manual_seed(0))


def built(kind: str, site: Site) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build_head(kind, site, "here").eval()


def test_a_site_knows_its_kind() -> None:
    kinds = [s.kind for s in (MAP, SEQUENCE, SECOND_AXIS, VECTOR, VOLUME, Site((12, "batch"), 1, 7))]
    assert kinds == ["map", "sequence", "sequence", "vector", "other", "other"]
    assert [s.width for s in (MAP, SEQUENCE, SECOND_AXIS, VECTOR)] == [12] * 4
    assert (CHANNELS_FIRST.kind, CHANNELS_FIRST.width) == ("sequence", 12)
    assert SECOND_AXIS.features == ("seq", 12)
    assert MAP.features == (12, 16, 16)


def test_auto_is_the_conv_branch_on_maps_and_one_linear_layer_elsewhere() -> None:
    assert default_kind(MAP) == "conv"
    assert type(build_head("auto", MAP, "here")) is ConvHead
    for site in (SEQUENCE, SECOND_AXIS, VECTOR, PER_POSITION):
        assert type(build_head("auto", site, "here")) is LinearHead


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("place", SITES)
def test_every_head_at_every_shape(kind: str, place: str) -> None:
    """Logits with the batch first, of the right size, each row for itself; or the reason why it does not fit."""
    site = SITES[place]
    if site.kind not in HEADS[kind].fits:
        with pytest.raises(StrategyError, match=f"head '{kind}' does not fit the value") as error:
            build_head(kind, site, "layer.3")
        assert error.value.where == "layer.3"
        assert site.kind in str(error.value.got)
        return
    if site.positions and kind in ONE_A_ROW:
        with pytest.raises(StrategyError, match="one prediction for a row, the model gives one per position"):
            build_head(kind, site, "layer.3")
        return
    if kind == "identity":
        return  # below
    head = built(kind, site)
    assert check_head(head, site, "here") is True
    for rows, length in ((1, 1), (4, 6)):
        h = value(site, rows, length)
        with torch.no_grad():
            logits = head(h)
            alone = head(h.narrow(site.batch_axis, rows - 1, 1))
        assert logits.shape == ((rows, length, 7) if site.positions else (rows, 7))
        torch.testing.assert_close(alone, logits[rows - 1 :], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize("site", [SEQUENCE, SECOND_AXIS], ids=["batch first", "batch second"])
def test_padding_is_left_out_of_the_mean(kind: str, site: Site) -> None:
    head = built(kind, site)
    h = value(site, 3, 5)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 1, 0, 1, 0]])
    other = h.clone()
    hidden = mask == 0 if site.batch_axis == 0 else (mask == 0).T
    other[hidden] = 1e4
    with torch.no_grad():
        torch.testing.assert_close(head(other, mask), head(h, mask))
        assert not torch.allclose(head(h, mask)[1:], head(h)[1:])
        cut = (h if site.batch_axis == 0 else h.transpose(0, 1))[1:2, :2]
        short = cut if site.batch_axis == 0 else cut.transpose(0, 1)
        torch.testing.assert_close(head(h, mask)[1:2], head(short))


@pytest.mark.parametrize("kind", [k for k, head in HEADS.items() if "sequence" in head.fits and k != "identity"])
def test_positions_may_come_last(kind: str) -> None:
    """As after a convolution over time: the same as of the sequence that it is."""
    head, other = built(kind, CHANNELS_FIRST), built(kind, SEQUENCE)
    h, mask = value(CHANNELS_FIRST), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 1, 0]])
    with torch.no_grad():
        torch.testing.assert_close(head(h, mask), other(h.transpose(1, 2), mask), rtol=0, atol=0)


def test_the_mean_of_no_position_is_zero() -> None:
    h = torch.randn(2, 3, 4)
    mask = torch.tensor([[1, 1, 1], [0, 0, 0]])
    got = mean_over_positions(h, mask)
    torch.testing.assert_close(got, torch.stack([h[0].mean(0), torch.zeros(4)]))
    torch.testing.assert_close(mean_over_positions(h, mask.bool()), got)


def test_the_head_of_bert_reads_the_first_token() -> None:
    for site in (SEQUENCE, SECOND_AXIS):
        head = built("pooler", site)
        assert isinstance(head, PoolerHead)
        h = value(site, 3, 5)
        first = h[:, 0] if site.batch_axis == 0 else h[0]
        want = head.classifier(torch.tanh(head.pooler(first)))
        torch.testing.assert_close(head(h), want)
        torch.testing.assert_close(head(h, torch.zeros(3, 5)), want)  # whatever the mask


def test_the_conv_branch_is_small_where_the_map_is_large() -> None:
    assert built("conv", MAP).conv.stride == (2, 2)
    assert built("conv", SMALL_MAP).conv.stride == (1, 1)
    wide = built("conv", Site(("batch", 512, 16, 16), 0, 7))
    assert wide.conv.out_channels == 64
    assert built("conv", MAP).conv.out_channels == 16


def test_the_hidden_layer_has_a_size_of_its_own() -> None:
    assert MLPHead(VECTOR).hidden.out_features == 32
    assert MLPHead(VECTOR, hidden=5).hidden.out_features == 5


def test_identity_hands_the_scores_on() -> None:
    scores = Site(("batch", 7), 0, 7)
    h = value(scores)
    assert torch.equal(built("identity", scores)(h), h)
    second = Site(("seq", "batch", 7), 1, 7, positions=True)
    assert torch.equal(built("identity", second)(value(second)), value(second).transpose(0, 1))


# ------------------------------------------------------------------------------------------------ what users give


def test_a_module_is_copied_and_a_factory_is_asked() -> None:
    mine = nn.Linear(12, 7)
    copy = build_head(mine, VECTOR, "here")
    assert copy is not mine
    assert torch.equal(copy.weight, mine.weight)
    made = build_head(lambda site: nn.Linear(site.width, site.classes), VECTOR, "here")
    assert isinstance(made, nn.Linear)
    assert check_head(made, VECTOR, "here") is False  # it takes no mask


def test_what_is_wrong_with_a_head_is_said_with_its_place() -> None:
    with pytest.raises(StrategyError, match=r"unknown head(.|\n)*did you mean linear") as error:
        build_head("linaer", VECTOR, "layer.1")
    assert error.value.where == "layer.1"
    with pytest.raises(StrategyError, match="a head factory gave no module") as error:
        build_head(lambda site: 3, VECTOR, "layer.1")  # type: ignore[arg-type, return-value]
    assert error.value.got == "int"
    with pytest.raises(StrategyError, match="logits of the wrong size") as error:
        check_head(nn.Linear(12, 6), VECTOR, "layer.1")
    assert error.value.got == [2, 6]
    assert "[2, 7]" in str(error.value.wanted)
    with pytest.raises(StrategyError, match="does not run on the value at its place") as error:
        check_head(nn.Linear(5, 7), VECTOR, "layer.1")
    assert "RuntimeError" in str(error.value.got)
    with pytest.raises(StrategyError, match="logits of the wrong size") as error:
        check_head(nn.LSTM(12, 7, batch_first=True), SEQUENCE, "layer.1")
    assert error.value.got == "tuple"


def test_checking_a_head_leaves_it_as_it_was() -> None:
    head = nn.Sequential(nn.Linear(12, 7), nn.BatchNorm1d(7)).train()
    before = {k: v.clone() for k, v in head.state_dict().items()}
    check_head(head, VECTOR, "here")
    assert head.training
    assert all(torch.equal(v, before[k]) for k, v in head.state_dict().items())


# ------------------------------------------------------------------------------------------------ branches


def test_a_branch_gives_its_score_along() -> None:
    branch = Branch(built("linear", SEQUENCE), score_head(SEQUENCE))
    logits, score = branch(value(SEQUENCE))
    assert logits.shape == (3, 7)
    assert score.shape == (3, 1)
    assert score_head(PER_POSITION)(value(PER_POSITION)).shape == (3, 1)  # one for the row all the same


@pytest.mark.parametrize("place", SITES)
def test_a_head_is_built_again_from_its_description(place: str) -> None:
    site = SITES[place]
    for kind in HEADS:
        if kind in ("identity", *ONE_A_ROW) and (site.kind not in HEADS[kind].fits or site.positions):
            continue
        if site.kind not in HEADS[kind].fits:
            continue
        for score in (None, score_head(site)):
            branch = Branch(built(kind, site), score).eval()
            data = describe(branch)
            assert data is not None
            again = rebuild(json.loads(json.dumps(data))).eval()
            again.load_state_dict(branch.state_dict())
            h = value(site)
            with torch.no_grad():
                a, b = branch(h), again(h)
            torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert describe(Branch(nn.Linear(12, 7))) is None
