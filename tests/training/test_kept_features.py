"""fit with a frozen trunk: features are kept once, heads are fitted to convergence, and their kinds are chosen."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

from eecompile import eecompile, load, strategies
from eecompile.errors import EecompileError
from eecompile.training.cache import Cache
from eecompile.training.head_fit import minimise
from tests.support import equal_bits, nightly

ROWS, LENGTH, CLASSES = 240, 8, 3


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + 0.3 * self.mlp(self.norm(x))
        return out


class Text(nn.Module):
    """Tokens do not see one another: the first says nothing of the others, their mean says which there are."""

    def __init__(self, width: int = 16, layers: int = 3, per_token: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(layers))
        self.out = nn.Linear(width, CLASSES)
        self.per_token = per_token

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x)
        if not self.per_token:
            weight = attention_mask.unsqueeze(-1).to(x.dtype)
            x = (x * weight).sum(1) / weight.sum(1)
        out: Tensor = self.out(x)
        return out


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(8, 32, 3, padding=1), nn.ReLU())
        self.third = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU())
        self.out = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.third(self.second(self.first(x))).mean((2, 3)))
        return out


def model(kind: type[nn.Module] = Text, **options: Any) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(**options).eval()


def texts(where: str = "middle", rows: int = ROWS, padding: int = 0, seed: int = 1) -> tuple[dict[str, Tensor], Tensor]:
    """Three tokens 2 to 4 say the class, or the first one; after them, padding that looks like another class."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (rows,), generator=g)
    ids = torch.randint(10, 40, (rows, LENGTH), generator=g)
    ids[:, 0] = 1
    if where == "first":
        ids[:, 0] = 2 + labels
        ids[:, 1:] = torch.randint(2, 2 + CLASSES, (rows, LENGTH - 1), generator=g)
    else:
        ids[:, 1:4] = 2 + labels.unsqueeze(1)
    mask = torch.ones(rows, LENGTH, dtype=torch.int64)
    if padding:
        mask[:, -padding:] = 0
        ids[:, -padding:] = 2 + torch.randint(0, CLASSES, (rows, 1), generator=g)
    return {"input_ids": ids, "attention_mask": mask}, labels


def pictures(rows: int = 120, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Classes by where the bright spot is: the mean over the map says nothing."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (rows,), generator=g)
    x = torch.rand(rows, 1, 16, 16, generator=g) * 0.2
    for i, k in enumerate(labels.tolist()):
        x[i, 0, 6:9, 3 * k + 3 : 3 * k + 6] += 1  # as far from the borders in every class
    return x, labels


def batched(inputs: Any, labels: Any, size: int = 32) -> list[Any]:
    if isinstance(inputs, Tensor):
        return list(zip(inputs.split(size), labels.split(size), strict=True))
    parts = {name: value.split(size) for name, value in inputs.items()}
    return [({n: p[i] for n, p in parts.items()}, y) for i, y in enumerate(labels.split(size))]


def compiled(strategy: Any = None, kind: type[nn.Module] = Text, **options: Any) -> Any:
    """What most tests take, two exits of its own kind in `Text`, is compiled once: each test has its copy."""
    if strategy is None and not options:
        return copy.deepcopy(two_exits())
    strategy = strategy or strategies.MeBert(exits=2)
    if kind is Images:
        return eecompile(model(Images), strategy, example_inputs=(pictures(4)[0],))
    return eecompile(model(**options), strategy, example_kwargs=texts(rows=4)[0])


@cache
def two_exits() -> Any:
    return eecompile(model(), strategies.MeBert(exits=2), example_kwargs=texts(rows=4)[0])


def weights(fast: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in fast.heads.state_dict().items()}


def same_weights(one: Any, other: Any) -> None:
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


# ------------------------------------------------------------------------------------------------ what is gained


def test_heads_are_at_their_best_at_once() -> None:
    train, test = batched(*texts()), batched(*texts(seed=2))
    old, new = compiled(strategies.MeBert(exits=2, head="pooler")), compiled()
    before = {name: p.clone() for name, p in new.original.named_parameters()}
    old_report = old.fit(train, epochs=2, cached=False, progress=False)
    report = new.fit(train, epochs=2, progress=False)
    chance = [row.accuracy_if_all for row in old.evaluate(test).rows[:-1]]
    found = [row.accuracy_if_all for row in new.evaluate(test).rows[:-1]]
    assert max(chance) < 0.5
    assert min(found) > 0.95
    assert [row.kind for row in report.heads] == ["linear", "linear"]
    assert report.draws == 1
    assert report.held_out == 48
    assert old_report.batch_by_batch == "cached=False was given"
    assert "batch by batch: cached=False was given" in str(old_report)
    assert all(torch.equal(p, before[name]) for name, p in new.original.named_parameters())
    assert not new.untrained
    json.dumps(report.to_dict(), allow_nan=False)


def test_the_report_says_what_the_module_does() -> None:
    train, val = batched(*texts()), batched(*texts(rows=60, seed=2))
    fast = compiled(strategies.MeBert(exits=2, distillation=0.5))
    report = fast.fit(train, val_loader=val, progress=False)
    (row,) = report.rows
    for loader, scores, loss in ((train, row.scores, row.loss), (val, row.val_scores, row.val_loss)):
        assert scores == pytest.approx([r.accuracy_if_all for r in fast.evaluate(loader).rows], abs=1e-6)
        fast.train()
        means = [float(fast.loss(fast.run(**x), y)) * len(y) for x, y in loader]
        fast.eval()
        assert loss == pytest.approx(sum(means) / sum(len(y) for _, y in loader), rel=1e-3)
    assert report.held_out == 60  # chosen on the rows of val_loader
    text = str(report)
    assert "exit_0" in text
    assert "60 rows held out" in text


# ------------------------------------------------------------------------------------------------ another kind of head


def test_another_kind_of_head_is_taken_where_it_is_better(tmp_path: Path) -> None:
    inputs, labels = texts("first")
    data = batched(inputs, labels)
    fast = compiled()
    fast.train()
    fast.run(**data[0][0])  # training graphs are there already
    fast.eval()
    report = fast.fit(data, progress=False)
    assert [row.kind for row in report.heads] == ["first", "first"]
    assert [row.before for row in report.heads] == ["linear", "linear"]
    assert set(report.heads[0].tried) >= {"linear", "first"}
    assert [e.head_kind for e in fast.exits] == ["first", "first"]
    assert type(fast.exits[0].head).__name__ == "FirstTokenHead"
    assert "head first" in str(fast)
    assert "first (was linear)" in str(report)
    assert min(row.accuracy_if_all for row in fast.evaluate(data).rows[:-1]) > 0.95
    fast.train()
    outputs = fast.run(**data[0][0]).outputs
    fast.eval()
    with torch.no_grad():
        equal_bits(outputs[0].detach(), fast.observe(**data[0][0]).outputs[0])
    fast.set_thresholds(0.5)
    fast.save(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert [e.head_kind for e in again.exits] == ["first", "first"]
    for executor in ("compact", "reference", "simulate"):
        fast.executor = again.executor = executor
        got, want = again.run(**inputs), fast.run(**inputs)
        equal_bits(got.output, want.output)
        assert torch.equal(got.exit_index, want.exit_index)
        assert int(want.exit_index.min()) == 0
    assert again.exits[0].head_cost == fast.exits[0].head_cost


class Skipped(Images):
    """Blocks that change next to nothing, and final layers that no small head can stand in for."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(12, 24), nn.ReLU())
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(24), nn.Linear(24, 96), nn.ReLU()) for _ in range(3))
        self.back = nn.ModuleList(nn.Linear(96, 24) for _ in range(3))
        self.tail = nn.Sequential(nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block, back in zip(self.blocks, self.back, strict=True):
            x = x + 1e-4 * back(block(x))
        out: Tensor = 20 * self.tail(10 * x)
        return out


def test_the_models_own_final_layers_are_tried_too(tmp_path: Path) -> None:
    x = torch.randn(160, 12, generator=torch.Generator().manual_seed(1))
    net = model(Skipped)
    with torch.no_grad():
        y = net(x).argmax(1)
    fast = eecompile(net, strategies.Branchy(exits=["blocks.0"], head="auto"), example_inputs=x[:4])
    before = {name: p.clone() for name, p in net.named_parameters()}
    report = fast.fit(batched(x, y), progress=False)
    assert report.heads[0].kind == "shared"
    assert fast.exits[0].head_kind == "shared"
    assert fast.evaluate([(x, y)]).rows[0].accuracy_if_all > 0.98
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())
    fast.set_thresholds(0.6)
    fast.save(tmp_path / "saved")
    again = load(tmp_path / "saved")
    for executor in ("compact", "reference"):
        fast.executor = again.executor = executor
        equal_bits(again.run(x).output, fast.run(x).output)
        assert int(fast.run(x).exit_index.min()) == 0
    assert again.fit(batched(x, y), progress=False).heads[0].kind == "shared"  # a choice that stays
    fast.fit(batched(x, y), epochs=1, trunk=True, progress=False)  # trained along with the trunk


@pytest.mark.parametrize("head", ["pooler", nightly("attention"), nightly("mlp")])
def test_a_kind_that_was_asked_for_stays(head: str) -> None:
    data = batched(*texts())
    fast = compiled(strategies.MeBert(exits=2, head=head))
    report = fast.fit(data, lr=1e-2, progress=False)
    assert [(row.kind, list(row.tried)) for row in report.heads] == [(head, [head])] * 2
    accuracy = [row.accuracy_if_all for row in fast.evaluate(data).rows[:-1]]
    assert (min(accuracy) > 0.95) == (head != "pooler")


def test_padding_is_left_out() -> None:
    data = batched(*texts(padding=4))
    fast = compiled()
    fast.fit(data, progress=False)
    other = [({**x, "input_ids": torch.where(x["attention_mask"] == 0, 39, x["input_ids"])}, y) for x, y in data]
    assert min(row.accuracy_if_all for row in fast.evaluate(other).rows[:-1]) > 0.95


def test_maps() -> None:
    x, y = pictures()
    fast = compiled(strategies.Branchy(exits=["second"]), Images)
    assert fast.exits[0].head_kind == "conv"
    before = [b.clone() for b in fast.original.buffers()]
    report = fast.fit(batched(x, y), lr=1e-2, progress=False)
    assert report.heads[0].kind == "conv"  # the mean over the map does not say where
    assert report.heads[0].score is not None and report.heads[0].score > 0.9
    assert all(torch.equal(a, b) for a, b in zip(before, fast.original.buffers(), strict=True))


def test_positions_scores_and_losses() -> None:
    inputs, _ = texts()
    labels = torch.where(inputs["attention_mask"] == 1, inputs["input_ids"] % CLASSES, -100)
    labels[:, -2:] = -100
    tokens = compiled(per_token=True)
    report = tokens.fit(batched(inputs, labels), progress=False)
    assert report.heads[0].kind == "mlp" or report.heads[0].score > 0.9
    learned = compiled(strategies.MeBert(exits=2, criterion="learned"))
    learned.fit(batched(*texts(rows=120)), progress=False)
    assert not learned.untrained
    regression = compiled()
    targets = torch.randn(ROWS, CLASSES, generator=torch.Generator().manual_seed(0)) * 0.01
    targets[:, 0] += texts()[1]
    report = regression.fit(batched(inputs, targets), loss=F.mse_loss, lr=1e-2, progress=False)
    assert report.heads[0].loss < 0.2
    assert report.heads[0].score is None


def test_a_module_of_the_users() -> None:
    data = batched(*texts())

    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, CLASSES)

        def forward(self, h: Tensor) -> Tensor:
            out: Tensor = self.layer(h[:, 1:4].mean(1))
            return out

    fast = compiled(strategies.MeBert(exits=2, head=Mine()))
    report = fast.fit(data, lr=1e-2, progress=False)
    assert [row.kind for row in report.heads] == ["Mine", "Mine"]
    assert min(row.accuracy_if_all for row in fast.evaluate(data).rows[:-1]) > 0.95


# ------------------------------------------------------------------------------------------------ memory and disk


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def test_past_the_limit_features_are_on_the_disk(place: Path) -> None:
    data = batched(*texts())
    in_memory, on_disk = compiled(), compiled()
    in_memory.fit(data, progress=False)
    seen: list[int] = []

    def look(event: Any) -> None:
        seen.append(sum(f.stat().st_size for f in place.rglob("*.bin")))

    on_disk.fit(data, cache_mb=0, progress=False, callbacks=[look])
    assert seen[0] > ROWS * LENGTH * 16 * 4
    assert not list(place.iterdir())
    same_weights(in_memory, on_disk)


def test_files_go_with_an_exception_too(place: Path) -> None:
    def stop(event: Any) -> None:
        assert list(place.rglob("*.bin"))
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        compiled().fit(batched(*texts()), cache_mb=0, progress=False, callbacks=[stop])
    assert not list(place.iterdir())


def test_whole_values_are_left_out_where_there_is_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    data = batched(*texts("first"))
    small = 8 * 32 * (2 * 2 * 16 + CLASSES) * 4  # the means and the first tokens of two exits
    monkeypatch.setattr("eecompile.training.cache.Cache.room_for", lambda self, size: size <= small)
    report = compiled().fit(data, progress=False)
    assert [row.kind for row in report.heads] == ["first", "first"]
    assert "were not tried" in report.notes[0]
    with pytest.raises(EecompileError, match="fit neither in memory nor on the disk"):
        compiled(strategies.MeBert(exits=2, head="attention")).fit(data, cached=True, progress=False)
    report = compiled(strategies.MeBert(exits=2, head="attention")).fit(data, progress=False)
    assert "fit neither in memory nor on the disk" in report.batch_by_batch


def test_a_cache_keeps_to_its_limits(place: Path) -> None:
    with Cache(limit=100, disk_limit=200) as cache:
        cache.add("a", torch.arange(20.0))
        cache.add("a", torch.arange(30, dtype=torch.bfloat16))
        assert (cache.in_memory, cache.on_disk) == (80, 60)
        written = cache.block("a", 1)
        assert torch.equal(written, torch.arange(30, dtype=torch.bfloat16))
        written.zero_()  # what is read is a copy
        assert torch.equal(cache.block("a", 1), torch.arange(30, dtype=torch.bfloat16))
        cache.add("empty", torch.empty(0, 3))
        assert cache.room_for(140)
        assert not cache.room_for(141)
        with pytest.raises(EecompileError, match="neither in memory nor on the disk"):
            cache.add("b", torch.zeros(40))
        cache.drop("a")
        assert (cache.in_memory, cache.on_disk) == (0, 0)
    assert not list(place.iterdir())


# ------------------------------------------------------------------------------------------------ data that change


class Noisy(Dataset[Any]):
    def __init__(self, noise: float) -> None:
        self.x, self.y = pictures()
        self.noise = noise

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.x[i] + self.noise * torch.randn(1), self.y[i]


@pytest.mark.parametrize(("noise", "options", "draws"), [(0.0, {}, 1), nightly(0.1, {}, 3), (0.1, {"draws": 2}, 2)])
def test_augmented_data_are_drawn_several_times(noise: float, options: dict[str, Any], draws: int) -> None:
    fast = compiled(strategies.Branchy(exits=["second"], head="linear"), Images)
    loader = DataLoader(Noisy(noise), 16, shuffle=True)
    report = fast.fit(loader, epochs=3, progress=False, **options)
    assert report.draws == draws
    assert any("change from pass to pass" in note for note in report.notes) == (draws == 3)
    assert report.held_out == 24 * draws  # the same rows of every pass
    assert any("epochs=3 sets no limit there" in note for note in report.notes) == (draws == 1)
    assert "until the loss stopped falling" in str(report)
    assert not any("differ in order" in note for note in report.notes)


def test_padding_of_another_length_is_no_change() -> None:
    inputs, labels = texts(padding=3)
    short = {name: value[:, :-3] for name, value in inputs.items()}

    class Loader:
        passes = 0

        def __iter__(self) -> Iterator[Any]:
            self.passes += 1
            return iter(batched(inputs if self.passes == 1 else short, labels))

    assert compiled().fit(Loader(), epochs=3, progress=False).draws == 1


def test_passes_in_another_order_are_reported() -> None:
    x, y = pictures()

    class Loader:
        def __iter__(self) -> Iterator[Any]:
            order = torch.randperm(len(y))
            return iter(batched(x[order] + 0.1 * torch.randn(len(y), 1, 1, 1), y[order]))

    fast = compiled(strategies.Branchy(exits=["second"], head="linear"), Images)
    assert any("differ in order" in note for note in fast.fit(Loader(), epochs=2, progress=False).notes)


# ------------------------------------------------------------------------------------------------ again and again


@pytest.mark.parametrize("head", [nightly("auto"), "mlp"])
def test_equal_bit_for_bit(head: str) -> None:
    loader = DataLoader(TensorDataset(*pictures()), 16, shuffle=True)
    one, two = (compiled(strategies.Branchy(exits=["first", "second"], head=head), Images) for _ in range(2))
    one.fit(loader, progress=False)
    torch.rand(3)
    two.fit(loader, progress=False)
    same_weights(one, two)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        before = torch.get_rng_state()
        one.fit(loader, progress=False)
        assert torch.equal(torch.get_rng_state(), before)


class Stop(Exception):
    pass


def test_resumes_between_heads(tmp_path: Path) -> None:
    inputs, labels = texts("first")
    data = batched(inputs, labels)
    whole, broken, other = (compiled() for _ in range(3))
    want = whole.fit(data, checkpoint_dir=tmp_path / "whole", progress=False)

    def kill(event: Any) -> None:
        raise Stop

    with pytest.raises(Stop):
        broken.fit(data, checkpoint_dir=tmp_path / "broken", callbacks=[kill], progress=False)
    report = other.fit(data, checkpoint_dir=tmp_path / "broken", resume="must", progress=False)
    same_weights(whole, other)
    assert [row.kind for row in report.heads] == [row.kind for row in want.heads] == ["first", "first"]
    assert [e.head_kind for e in other.exits] == ["first", "first"]
    assert report.resumed_from == report.heads[0].steps
    done = compiled()
    again = done.fit(data, checkpoint_dir=tmp_path / "broken", resume="must", progress=False)
    same_weights(whole, done)
    assert again.rows == report.rows
    assert not done.untrained
    with pytest.raises(EecompileError, match="other settings"):
        done.fit(data, checkpoint_dir=tmp_path / "broken", seed=3, progress=False)


# ------------------------------------------------------------------------------------------------ where it cannot be


def cosine_needs_steps(**options: Any) -> Callable[[], tuple[Any, dict[str, Any]]]:
    return lambda: (compiled(), options)


REASONS = {
    "scheduler= was given": cosine_needs_steps(scheduler="cosine"),
    "max_grad_norm= was given": cosine_needs_steps(max_grad_norm=1.0),
    "an exit has weight 0": lambda: (compiled(strategies.MeBert(exits=2, weights=(0, 1, 1))), {}),
    "exits answer together": lambda: (compiled(strategies.MeBert(exits=2, combine="ensemble")), {}),
    "gates, halting steps or routers": lambda: (compiled(strategies.MeBert(exits=2) + strategies.SkipNet()), {"epochs": 3}),
}


@pytest.mark.parametrize("reason", REASONS)
def test_the_reason_is_reported_and_insisting_is_an_error(reason: str) -> None:
    fast, options = REASONS[reason]()
    data = batched(*texts(rows=64))
    with pytest.raises(EecompileError, match=reason):
        fast.fit(data, cached=True, trunk=False, progress=False, **options)
    report = fast.fit(data, trunk=False, progress=False, **options)
    assert reason in report.batch_by_batch
    assert reason in " ".join(str(report).split())
    assert not report.heads


def test_a_trunk_that_is_trained_is_trained_as_before() -> None:
    data = batched(*texts(rows=64))
    one, two = compiled(), compiled()
    report = one.fit(data, epochs=2, trunk=True, progress=False)
    assert [(row.stage, row.steps) for row in report.rows] == [("joint", 2), ("joint", 4)]
    assert not report.heads and not report.batch_by_batch
    staged = two.fit(data, epochs=1, two_stage=True, progress=False)
    assert [row.stage for row in staged.rows] == ["trunk", "heads"]
    assert [row.kind for row in staged.heads] == [e.head_kind for e in two.exits]


def test_joint_training_may_start_from_fitted_heads() -> None:
    inputs, labels = texts("first")
    data = batched(inputs, labels)
    fast = compiled()
    report = fast.fit(data, trunk=True, cached=True, progress=False)
    assert [row.stage for row in report.rows] == ["heads", "joint"]
    assert [e.head_kind for e in fast.exits] == ["first", "first"]
    assert min((report.rows[1].scores or [0.0])[:2]) > 0.9  # while training, from the first batch on
    with pytest.raises(EecompileError, match="no stage trains heads alone"):
        compiled(strategies.MeBert(exits=2) + strategies.SkipNet()).fit(data, epochs=3, cached=True, progress=False)


def test_a_loader_that_is_read_once() -> None:
    data = batched(*texts())
    report = compiled().fit(iter(data), progress=False)
    assert report.draws == 1
    assert report.heads[0].score > 0.95


def test_labels_are_checked_before_any_head_is_fitted() -> None:
    inputs, labels = texts()
    fast = compiled()
    before = weights(fast)
    with pytest.raises(EecompileError, match="labels out of range"):
        fast.fit(batched(inputs, labels + CLASSES), progress=False)
    with pytest.raises(EecompileError, match="the training loader is empty"):
        fast.fit([], progress=False)
    assert all(torch.equal(value, before[name]) for name, value in weights(fast).items())
    assert fast.untrained


# --- a limit of time


@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_time_that_runs_out_is_kept_to_and_said(head: str) -> None:
    fast, loader = compiled(strategies.MeBert(exits=2, head=head)), batched(*texts())
    report = fast.fit(loader, cached=True, seconds=1e-6, progress=False)
    assert all(row.cut for row in report.heads) and "were fitted to the end" in " ".join(str(report).split())
    assert all(row.steps <= 1 for row in report.heads)
    assert all(bool(p.isfinite().all()) for p in fast.head_parameters())
    whole = fast.fit(loader, cached=True, seconds=600, progress=False)
    assert not any(row.cut for row in whole.heads) and "ran out" not in str(whole)
    assert all(a.loss < b.loss for a, b in zip(whole.heads, report.heads, strict=True))


def test_the_best_point_so_far_is_taken() -> None:
    calls = [0]

    def loss(w: Tensor, b: Tensor) -> Tensor:
        calls[0] += 1
        value = ((w - 3) ** 2).sum() + (b + 1).square().sum() + (w * b).sum()
        value.backward()
        return value.detach()

    def after(count: int) -> float:
        w, b = torch.zeros(1, 1, requires_grad=True), torch.zeros(1, requires_grad=True)
        calls[0] = 0
        minimise(loss, w, b, 0.1, lambda: calls[0] >= count)
        return float(loss(w, b) + 0.05 * w.square().sum())

    found = [after(n) for n in (1, 2, 3, 5, 1000)]
    assert found == sorted(found, reverse=True) and found[0] > found[-1]


def test_time_is_for_kept_features() -> None:
    with pytest.raises(EecompileError, match="cached=True"):
        compiled().fit(batched(*texts()), seconds=1.0, progress=False)
