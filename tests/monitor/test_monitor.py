"""Monitors of compiled modules: shadow rows, reactions, late labels, saving, logs, threads, bad input."""

from __future__ import annotations

import copy
import functools
import json
import math
import os
import signal
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from eecompile import strategies
from eecompile.calibration.monitor import MOST_LINES, Monitor, MonitorOptions, read_state
from eecompile.errors import CalibrationError, DriftWarning
from tests.cli.shell import found
from tests.support import compiled as eecompile

CENTRES = 3 * torch.nn.functional.one_hot(torch.arange(3), 8).float()


def rows(n, seed, noise=1.0):
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 3, (n,), generator=g)
    return CENTRES[y] + noise * torch.randn(n, 8, generator=g), y


@pytest.fixture(scope="module")
def made():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
    x, y = rows(2000, 0)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    fast = eecompile(model.eval(), strategies.Branchy(exits=1, max_head_share=9.0), example_inputs=(x[:4],))
    fast.fit([(x, y)] * 20, lr=1e-2, progress=False)
    report = fast.calibrate([rows(2000, 1)], max_drop=0.05)
    assert report.qualified and len(report.safer) >= 1, str(report)
    return fast


@pytest.fixture
def fast(made):
    settings, guarantee = made.settings, made.guarantee
    yield made
    made.settings, made.guarantee = settings, guarantee


def fed(watch, batches):
    for x in batches:
        watch(x)


def shifted(n, seed):
    """The early exit and the full model disagree on rows between the classes."""
    return rows(n, seed, noise=8.0)[0]


@pytest.mark.parametrize("share", [1.0, 0.3, 0.01, 1e-300])
def test_each_row_is_a_shadow_row_with_the_same_probability(fast, share):
    watch, batches, size = fast.monitor(shadow=share), 6000, 7
    found = [i for _ in range(batches) for i in watch._chosen(size)]
    by_place = torch.bincount(torch.tensor(found, dtype=torch.long), minlength=size)
    assert len(by_place) == size
    spread = 5 * math.sqrt(batches * share * (1 - share))
    assert all(abs(int(n) - batches * share) <= spread for n in by_place)


@pytest.mark.parametrize("differ", [math.nan, 1.5])
def test_what_compare_gives_is_checked(fast, differ):
    watch = fast.monitor(shadow=1.0, compare=lambda early, full: torch.full((len(early),), differ))
    with pytest.raises(CalibrationError, match=r"NaN|leave \[0, 1\]"):
        watch(rows(5, 1)[0])
    assert watch.state.rows == 0


def test_the_answers_are_those_of_the_program_and_nothing_alarms(fast):
    watch, x = fast.monitor(max_drop=0.02, shadow=0.3), rows(1500, 2)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error", DriftWarning)
        for part in x.split(100):
            assert torch.equal(watch(part), fast(part))
    state = watch.state
    assert state.rows == 1500 and 350 < state.differ.rows < 550
    assert state.alarms == [] and state.mix_alarm is None
    assert state.counts == torch.bincount(fast.run(x).exit_index, minlength=2).tolist()
    assert "no alarm" in str(watch)


def test_shadow_rows_are_compared_with_the_full_model(fast):
    watch, x = fast.monitor(shadow=1.0, limit=0.9), shifted(300, 3)
    watch(x)
    differ = (fast(x).argmax(1) != fast.full(x).argmax(1)).double()
    assert watch.state.differ.total == float(differ.sum()) and watch.state.differ.rows == 300


def test_drift_alarms_once_and_warns(fast):
    watch = fast.monitor(max_drop=0.01, shadow=1.0, limit=0.005)
    with pytest.warns(DriftWarning):
        fed(watch, [shifted(100, seed) for seed in range(20)])
    (alarm,) = watch.state.alarms
    assert alarm["mean"] > 0.005 and watch.state.spent == pytest.approx(0.05)
    assert "ALARM" in str(watch) and "alpha is spent" in str(watch)


def test_sorted_data_change_the_mix(fast):
    watch, x = fast.monitor(shadow=0.01), rows(3000, 5)[0]
    order = fast.run(x).confidence.argsort()
    with pytest.warns(DriftWarning, match="mix of exits"):
        fed(watch, x[order].split(100))
    assert watch.state.mix_alarm < 1500


def test_closing_takes_the_next_safer_settings_then_none(fast):
    watch = fast.monitor(shadow=1.0, limit=0.001, react="close")
    steps = [fast.guarantee.settings, *fast.guarantee.safer]
    fast.settings = fast.settings.from_dict(steps[-2] if len(steps) > 1 else steps[-1])
    with pytest.warns(DriftWarning):
        watch.take([0] * 50, differ=[1] * 50)
    assert fast.settings.to_dict() == steps[-1] and fast.guarantee.void(fast) == ""
    spent = [watch.state.spent]
    with pytest.warns(DriftWarning):
        watch.take([0] * 50, differ=[1] * 50)
    spent.append(watch.state.spent)
    assert fast.settings == fast.settings.neutral() and fast.guarantee.void(fast) == ""
    assert spent == [pytest.approx(0.025), pytest.approx(0.0375)]


def test_recalibration_spends_delta(fast):
    before = fast.guarantee.delta
    watch = fast.monitor(shadow=1.0, limit=0.001, react="recalibrate", loader=[rows(2000, 7)])
    with pytest.warns(DriftWarning, match="calibrated again with delta 0.025"):
        watch.take([0] * 50, differ=[1] * 50)
    assert fast.guarantee.delta == before / 2 and fast.guarantee.void(fast) == ""


def test_late_labels_test_the_drop(fast):
    watch, (x, y) = fast.monitor(shadow=1.0, limit=0.9), rows(400, 8)
    watch.run(x, ids=range(400))
    assert watch.labels({i: int(y[i]) for i in range(300)} | {"unknown": 0}) == 300
    full, early = (p.argmax(1)[:300] == y[:300] for p in (fast.full(x), fast(x)))
    assert watch.state.drop.total == float(full.double().sum() - early.double().sum())
    wrong = (fast.full(x).argmax(1) != fast(x).argmax(1)).nonzero()[:, 0].tolist()
    assert len(watch.waiting) == 100 and set(watch.waiting) == set(range(300, 400)), wrong


def test_state_is_kept_and_taken_up_again(fast, tmp_path):
    path = tmp_path / "watch.json"
    watch = fast.monitor(shadow=0.5, path=path)
    for seed in range(3):
        watch(rows(100, seed)[0])
    again = fast.monitor(shadow=0.5, path=path)
    assert again.state == watch.state and read_state(path) == watch.state
    assert [p.name for p in tmp_path.iterdir()] == ["watch.json"]
    shown = found("monitor", str(path))
    assert shown["counts"] == watch.state.counts
    with pytest.raises(CalibrationError, match=r"other options[\s\S]*alpha=0.01, shadow=0.2[\s\S]*alpha=0.05, shadow=0.5"):
        fast.monitor(shadow=0.2, alpha=0.01, path=path)
    path.write_text('{"format": "something"}')
    with pytest.raises(CalibrationError, match="no state of a monitor"):
        fast.monitor(path=path)
    data = {**json.loads(json.dumps(watch.state.to_dict())), "program": {"exits": ["other"], "weights": "0"}}
    path.write_text(json.dumps(data))
    with pytest.raises(CalibrationError, match="of another program"):
        fast.monitor(path=path)


def test_eight_threads(fast, tmp_path):
    watch, x = fast.monitor(shadow=0.2, path=tmp_path / "watch.json"), rows(2000, 9)[0]
    threads = [threading.Thread(target=fed, args=(watch, part.split(50))) for part in x.split(250)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert watch.state.rows == 2000
    assert watch.state.differ.history[-1][0] == watch.state.differ.rows
    assert read_state(watch.path) == watch.state


class Guaranteed:
    """What a monitor reads of a calibrated module."""

    exits = (SimpleNamespace(name="exit_0"),)
    guarantee = SimpleNamespace(
        rows=100, shares=[0.9, 0.1], made_for={"weights": "1"}, max_drop=0.05, target="accuracy", disagreement=0.02,
        void=lambda fast: "",
    )  # fmt: skip


def one_batch(watch, k):
    """Every fifth has a shadow row."""
    watch.take([0] * 9 + [1], [0.5 + k % 7 / 100] * 10, [0.0] if k % 5 == 0 else None)


FOREVER = """
import itertools, sys
from eecompile.calibration.monitor import Monitor, MonitorOptions
from tests.monitor.test_monitor import Guaranteed, one_batch
watch = Monitor(Guaranteed(), MonitorOptions(), path=sys.argv[1])
for k in itertools.count():
    one_batch(watch, k)
    print(k + 1, flush=True)
"""


def test_sigkill_loses_at_most_the_last_batch(tmp_path):
    path, root = tmp_path / "watch.json", Path(__file__).parents[2]
    command = [sys.executable, "-c", FOREVER, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(root)}) as run:
        for line in run.stdout:
            if int(line) > MOST_LINES + 20:  # the state was written anew meanwhile
                break
        run.send_signal(signal.SIGKILL)
        printed = int((run.stdout.read().split() or [line])[-1])
    kept = read_state(path)
    done = kept.rows // 10
    assert done in (printed, printed + 1)
    whole = Monitor(Guaranteed(), MonitorOptions())
    for k in range(done):
        one_batch(whole, k)
    assert kept == whole.state and kept.differ.rows == -(-done // 5)
    assert found("monitor", str(path))["counts"] == kept.counts


def test_a_line_that_is_cut_short_is_no_batch(tmp_path):
    path = tmp_path / "watch.json"
    watch = Monitor(Guaranteed(), MonitorOptions(), path=path)
    for k in range(4):
        one_batch(watch, k)
    text = path.read_bytes()
    path.write_bytes(text[:-4])
    assert read_state(path).rows == 30
    again = Monitor(Guaranteed(), MonitorOptions(), path=path)
    one_batch(again, 3)
    assert read_state(path) == again.state == watch.state
    path.unlink()  # by a clean-up, say
    one_batch(again, 4)
    one_batch(again, 5)
    assert read_state(path) == again.state
    for cut in (text.replace(b"[9, 1]", b"[9]"), text.replace(b"[[9, 1]", b"[9, 1]"), text.replace(b"]\n", b"\n")):
        path.write_bytes(cut)
        with pytest.raises(CalibrationError, match=r"is damaged|cannot be read"):
            read_state(path)


def places(data, at=()):
    """Keys of every value of JSON objects within objects."""
    for key, value in data.items():
        yield (*at, key)
        if isinstance(value, dict):
            yield from places(value, (*at, key))


def test_damaged_states(tmp_path):
    path = tmp_path / "watch.json"
    one_batch(Monitor(Guaranteed(), MonitorOptions(), path=path), 1)
    text = path.read_text()
    wrong = ["null", "[]", "{}", '"a"', "\xff"]
    wrong += [
        f"{text}\n{line}\n[]" for line in ("3", "[[9], 1, []]", "[[9, 1], NaN, []]", "[[9, -1], 1, []]", "[[9, 1], 1, [7]]")
    ]
    for place in places(json.loads(text)):
        for other in ({"a": 1}, [[]], True, ...):
            data = json.loads(text)
            inner = functools.reduce(dict.__getitem__, place[:-1], data)
            if other is ...:
                del inner[place[-1]]
            else:
                inner[place[-1]] = other
            wrong.append(json.dumps(data))
    for one in wrong:
        path.write_text(one, encoding="latin-1")
        with pytest.raises(CalibrationError) as caught:
            Monitor(Guaranteed(), MonitorOptions(), path=path)
        assert str(path) in str(caught.value), one


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"max_drop": 0}, "max_drop is out of range"),
        ({"alpha": 1}, "alpha is out of range"),
        ({"alpha": 0}, "alpha is out of range"),
        ({"shadow": 0}, "shadow is out of range"),
        ({"shadow": math.nan}, "shadow is not a number"),
        ({"react": "clos"}, "did you mean close"),
        ({"react": "recalibrate"}, "rows with labels"),
        ({"limit": 1.5}, "limit is out of range"),
    ],
)
def test_bad_options(fast, options, text):
    with pytest.raises(CalibrationError, match=text):
        fast.monitor(**options)


def test_logs_of_another_program_and_programs_without_a_guarantee(fast):
    watch = fast.monitor()
    with pytest.raises(CalibrationError, match="log of another program"):
        watch.take([0, 5], [0.9, 0.8])
    with pytest.raises(CalibrationError, match=r"leave \[0, 1\]"):
        watch.take([0, 1], differ=[2.0])
    with pytest.raises(CalibrationError, match="NaN or infinity"):
        watch.take([0, 1], [0.5, math.inf])
    watch.take([], [])
    fast.guarantee = None
    with pytest.raises(CalibrationError, match="no guarantee"):
        fast.monitor()


CHANGED = {
    "settings": (lambda fast: fast.set_thresholds(0.1), "other settings than were calibrated"),
    "weights": (lambda fast: next(fast.parameters()).mul_(1.5), "the weights have changed"),
}


@pytest.mark.parametrize("what", CHANGED)
def test_a_guarantee_that_is_void_is_not_watched(fast, what):
    twin = copy.deepcopy(fast)
    change, why = CHANGED[what]
    twin.monitor()
    with torch.no_grad():
        change(twin)
    with pytest.raises(CalibrationError, match=f"the guarantee is void: {why}"):
        twin.monitor()
