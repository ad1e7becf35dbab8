"""What holds of every kind of program: each kind of `tests.kinds` times each invariant of the compiler."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from eecompile import UnsupportedModelError, load
from eecompile.passes import find_token_parts
from eecompile.runtime.device.executor import Options
from tests.kinds import KINDS, Program
from tests.support import close, equal_bits, executor, neutral, random_settings, run_by, same_result, shares_parameters

SIZES = (1, 5, 8)
DRAWS = 3


@pytest.fixture(scope="module")
def programs() -> dict[str, Program]:
    return {}


@pytest.fixture(params=[pytest.param(n, marks=() if k.often else pytest.mark.nightly) for n, k in KINDS.items()])
def program(request: Any, programs: dict[str, Program], monkeypatch: pytest.MonkeyPatch) -> Program:
    """Compiled once; neutral at the start of every test."""
    name = request.param
    monkeypatch.setattr(find_token_parts, "MOVING", 0.0)  # live positions are gathered however small the parts are
    if name not in programs:
        programs[name] = KINDS[name].build()
    found = programs[name]
    found.fast.eval()
    neutral(found.fast)
    return found


def split(program: Program, result: Any, seen: dict[str, set[Any]]) -> None:
    """Collects, for each field that is to differ between the rows of one batch, what differed."""
    for name in program.kind.splits:
        rows = getattr(result, name).detach().flatten(1) if getattr(result, name).ndim > 1 else getattr(result, name)
        if len(torch.unique(rows, dim=0)) > 1:
            seen.setdefault(name, set()).update(map(str, torch.unique(rows, dim=0).tolist()))


def test_neutral_settings_are_the_model(program):
    """Bit for bit, in every executor, whatever the batch: nothing exits, nothing is skipped, nothing more is paid."""
    fast, model = program.fast, program.model
    for size in SIZES:
        args, kwargs = program.kind.call(size, 1)
        with torch.no_grad():
            want = model(*args, **kwargs)
            same = equal_bits if program.kind.exact else close
            same(fast(*args, **kwargs), want)
            equal_bits(fast.full(*args, **kwargs), fast(*args, **kwargs))
        reference = run_by("reference", fast, *args, **kwargs)
        for name in ("reference", *program.kind.executors):
            result = run_by(name, fast, *args, **kwargs)
            equal_bits(result.output, reference.output)
            same(result.output, want)
            same_result(result, reference)
            assert result.exit_index.tolist() == [len(fast.exits)] * size
            assert result.cost.tolist() == [1.0] * size
            if result.gates is not None and not program.kind.members:  # with its exits closed a model is not run at all
                assert bool(result.gates.all())
            if result.widths is not None:
                assert bool((result.widths == 1).all())
            if result.route is not None:
                assert result.route.tolist() == [len(fast.routes) - 1] * size


def test_executors_agree_at_random_settings(program):
    """Outputs, exits, confidences, costs and choices, while rows of one batch really go different ways."""
    fast, rng = program.fast, random.Random(7)
    seen: dict[str, set[Any]] = {}
    for size in SIZES:
        args, kwargs = program.kind.call(size, 2)
        for draw in range(DRAWS):
            random_settings(fast, args, kwargs, rng)
            reference = run_by("reference", fast, *args, **kwargs)
            split(program, reference, seen)
            for name in program.kind.executors if draw < 2 else ("compact",):
                if name == "simulate":
                    fast.device_options = Options(structure=("nested", "machine")[draw % 2])
                same_result(run_by(name, fast, *args, **kwargs), reference)
            with torch.no_grad():
                close(fast(*args, **kwargs), reference.output)
    fast.device_options = Options()
    assert seen.keys() == set(program.kind.splits), "in no batch rows differed in the others"
    if "simulate" in program.kind.executors:
        args, kwargs = program.kind.call(3, 2)  # few rows have few buckets: each of them is gone through
        report = fast.check_no_sync(*args, **kwargs)
        assert report.ok, str(report)


def test_a_row_alone_is_the_row_in_its_batch(program):
    fast = program.fast
    args, kwargs = program.kind.call(6, 3)
    random_settings(fast, args, kwargs, random.Random(11))
    whole = fast.run(*args, **kwargs)
    for row in (0, 4):
        one = fast.run(
            *(t[row : row + 1] for t in args),
            **{k: t[row : row + 1] if isinstance(t, Tensor) else t for k, t in kwargs.items()},
        )
        assert one.exit_index[0] == whole.exit_index[row]
        torch.testing.assert_close(one.cost[0], whole.cost[row], atol=1e-6, rtol=0)
        close(fast.prediction_of(one.output)[0], fast.prediction_of(whole.output)[row])
        for name in ("gates", "widths", "route"):
            if getattr(whole, name) is not None:
                assert torch.equal(getattr(one, name)[0], getattr(whole, name)[row]), name


def test_a_stream_ends_where_run_does(program):
    fast, rng = program.fast, random.Random(5)
    args, kwargs = program.kind.call(6, 4)
    if program.kind.options.get("capture") == "blocks":
        with pytest.raises(UnsupportedModelError, match="no stream"):
            list(fast.stream(*args, **kwargs))
        return
    for _ in range(2):
        random_settings(fast, args, kwargs, rng)
        with torch.no_grad():
            streamed = list(fast.stream(*args, **kwargs))
            whole = fast.run(*args, **kwargs)
            with executor(fast, "reference"):
                wanted = list(fast.stream(*args, **kwargs))
        for got, want in zip(streamed, wanted, strict=True):
            same_result(got, want)
        same_result(streamed[-1], whole)
        assert bool(streamed[-1].final.all())
        assert not any(bool(r.final.all()) for r in streamed[:-1])
        for earlier, later in zip(streamed, streamed[1:], strict=False):
            assert bool(later.final[earlier.final].all()), "a row that was final is not any more"
            assert torch.equal(later.exit_index[earlier.final], earlier.exit_index[earlier.final])
            assert bool((later.cost >= earlier.cost - 1e-6).all())


def test_what_is_loaded_is_what_was_saved(program, tmp_path):
    """Twice over, with every setting."""
    fast = program.fast
    if not program.kind.saves:
        with pytest.raises(Exception, match="cannot be saved"):
            fast.save(tmp_path / "once")
        return
    args, kwargs = program.kind.call(6, 5)
    random_settings(fast, args, kwargs, random.Random(3))
    fast.save(tmp_path / "once")
    once = load(tmp_path / "once")
    once.save(tmp_path / "twice")
    twice = load(tmp_path / "twice")
    for back in (once, twice):
        # a module among a strategy's options comes back as its name
        assert str(back.strategy.to_dict()) == str(fast.strategy.to_dict())
        for name in ("exits", "gates", "halts", "routes", "widths"):
            assert [plain(r) for r in getattr(back, name)] == [plain(r) for r in getattr(fast, name)], name
        for name in ("compact", "reference"):
            want, got = (run_by(name, one, *args, **kwargs) for one in (fast, back))
            equal_bits(got.output, want.output)
            same_result(got, want)
        neutral(back)
        with torch.no_grad():
            equal_bits(back(*args, **kwargs), fast.full(*args, **kwargs))


def plain(record: Any) -> dict[str, Any]:
    """What a record says, without modules; numbers up to what float32 keeps."""
    kept = {k: v for k, v in vars(record).items() if k != "units" and not isinstance(v, torch.nn.Module)}
    return {k: pytest.approx(v, rel=1e-6) if isinstance(v, float) else v for k, v in kept.items()}


def test_the_original_is_untouched(program):
    """By compiling, by calls in every executor, by gradients in train mode."""
    fast = program.fast
    if not program.kind.members:
        shares_parameters(fast, torch.nn.ModuleList(program.parts.values()))
    args, kwargs = program.kind.call(5, 6)
    random_settings(fast, args, kwargs, random.Random(2))
    for name in ("reference", *program.kind.executors):
        run_by(name, fast, *args, **kwargs)
    fast.observe(*args, **kwargs)
    assert program.changes() == []
    if not list(fast.head_parameters()):
        return
    fast.train_trunk, modes = False, [stage.gate_mode for stage in fast.strategy.stages]
    fast.gate_mode = modes[0] if modes else "hard"
    fast.train()
    fast.loss(fast.run(*args, **kwargs), torch.arange(5) % 2).backward()
    fast.eval()
    fast.gate_mode = "hard"
    fast.zero_grad()
    assert program.changes() == []


class Killed(BaseException):
    """Ends a run at once, past every handler."""


def test_a_fit_that_is_resumed_ends_where_an_unbroken_one_does(program, tmp_path):
    fast, batches = program.fast, program.kind.batches()
    epochs = max(2, len(fast.strategy.stages))
    options: dict[str, Any] = {"epochs": epochs, "checkpoint_every": 2, "progress": False, "lr": 1e-2}
    if not list(fast.head_parameters()):
        options["trunk"] = True
    start = {name: t.clone() for name, t in fast.state_dict().items()}
    middle = 3 * epochs // 2 + 1

    def kill(event: Any) -> None:
        if event.kind == "step" and event.step == middle:
            raise Killed

    try:
        fast.fit(batches, checkpoint_dir=tmp_path / "whole", **options)
        want = {name: t.clone() for name, t in fast.state_dict().items()}
        assert any(not torch.equal(start[name], t) for name, t in want.items()), "nothing was trained"
        back_to(fast, start)
        with pytest.raises(Killed):
            fast.fit(batches, checkpoint_dir=tmp_path / "broken", callbacks=[kill], **options)
        back_to(fast, start)
        report = fast.fit(batches, checkpoint_dir=tmp_path / "broken", **options)
        assert report.resumed_from
        for name, t in fast.state_dict().items():
            assert torch.equal(t, want[name]), name
    finally:
        back_to(fast, start)
        fast.zero_grad()


def back_to(fast: Any, state: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, t in fast.state_dict().items():
            t.copy_(state[name])
