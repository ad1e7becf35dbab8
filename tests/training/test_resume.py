"""Checkpoints: a run that is killed at any step and resumed ends bit for bit where an unbroken one ends."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from eecompile.errors import ArtifactError, EecompileError
from eecompile.training.checkpoint import Checkpoints, differences
from eecompile.training.fit import fit
from eecompile.training.state import decode, encode, random_state, restore_random_state
from tests.training.fake import Fake, batched, blobs

X, Y = blobs(30)


class Augmented(Dataset):
    """Every read draws from torch's and Python's global generators, as augmentation does."""

    def __len__(self):
        return len(X)

    def __getitem__(self, i):
        return X[i] + 0.1 * torch.randn(X.shape[1]) + 0.1 * random.random(), Y[i]


def loader(generator=False):
    return DataLoader(
        Augmented(),
        batch_size=8,
        shuffle=True,
        generator=torch.Generator().manual_seed(9) if generator else None,
    )


class Killed(BaseException):
    """Ends a run at once, past every handler: nothing is written."""


def kill_at(step):
    def callback(event):
        if event.kind == "step" and event.step == step:
            raise Killed

    return callback


def full_state(fast):
    return {name: tensor.clone() for name, tensor in fast.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


SETTINGS = [
    {"epochs": 2, "checkpoint_every": 1},
    {"epochs": 2, "checkpoint_every": 3, "scheduler": "cosine", "generator": True},
    {"epochs": 1, "two_stage": True, "checkpoint_every": 2},
    {"epochs": 3, "patience": 1, "trunk": True, "lr": 0.05, "checkpoint_every": 2},
    {"epochs": 2, "optimizer": lambda groups: torch.optim.SGD(groups, momentum=0.9), "max_grad_norm": 0.1},
]


def train(directory, options, callbacks=(), spoil=False):
    options = dict(options)
    data = loader(options.pop("generator", False))
    fast = Fake()
    if spoil:  # what is trained must come from the checkpoint
        trunk = options.get("trunk") or options.get("two_stage")
        with torch.no_grad():
            for tensor in [
                *fast.heads.parameters(),
                *fast.heads.buffers(),
                *(fast.trunk_parameters() if trunk else ()),
            ]:
                tensor.add_(1)
    torch.manual_seed(time.time_ns() % 2**31)  # whatever ran before must not matter
    val = batched(X, Y) if "patience" in options else None
    report = fit(fast, data, val_loader=val, checkpoint_dir=directory, callbacks=callbacks, **options)
    return fast, report


@pytest.mark.parametrize("options", SETTINGS, ids=lambda options: "-".join(options))
def test_resumes_bit_for_bit_after_a_kill_at_every_step(tmp_path, options):
    whole, report = train(tmp_path / "whole", options)
    wanted, rows = full_state(whole), [(r.loss, r.scores, r.val_loss, r.lr) for r in report.rows]
    assert report.steps >= 4
    for step in range(1, report.steps + 1):
        directory = tmp_path / f"killed-{step}"
        with pytest.raises(Killed):
            train(directory, options, [kill_at(step)])
        saved = directory.exists()
        resumed, again = train(directory, options, spoil=saved)
        assert same(wanted, full_state(resumed)), step
        assert [(r.loss, r.scores, r.val_loss, r.lr) for r in again.rows] == rows
        assert again.steps == report.steps
        assert again.resumed_from == last_saved(options, report, step) if saved else again.resumed_from is None


def last_saved(options, report, step):
    """Step of the newest checkpoint when the run is killed after `step`."""
    every = options.get("checkpoint_every", 10**9)
    ends = [row.steps for row in report.rows if row.steps < step]
    return max(step // every * every, *ends, 0)


def test_kills_one_after_the_other(tmp_path):
    options = {"epochs": 2, "checkpoint_every": 1}
    whole, report = train(tmp_path / "whole", options)
    for step in range(1, report.steps + 1):
        with pytest.raises(Killed):
            train(tmp_path / "broken", options, [kill_at(step)])
    resumed, again = train(tmp_path / "broken", options)
    assert same(full_state(whole), full_state(resumed))
    assert again.resumed_from == report.steps


def test_a_run_that_ended_is_not_trained_further_but_can_be_made_longer(tmp_path):
    longer, _ = train(tmp_path / "a", {"epochs": 3})
    short, report = train(tmp_path / "b", {"epochs": 2})
    again, second = train(tmp_path / "b", {"epochs": 2})
    assert same(full_state(short), full_state(again))
    assert second.resumed_from == report.steps == second.steps
    more, third = train(tmp_path / "b", {"epochs": 3})
    assert same(full_state(longer), full_state(more))
    assert third.resumed_from == report.steps < third.steps


def test_a_generator_left_in_another_state_does_not_matter(tmp_path):
    data, fast = loader(True), Fake()
    list(data)
    fit(fast, data, epochs=2)
    other = Fake()
    fit(other, loader(True), epochs=2)
    assert same(full_state(fast), full_state(other))


def test_ctrl_c_writes_a_checkpoint_and_says_how_to_resume(tmp_path, capsys):
    def press(event):
        if event.step == 3 and event.kind == "step":
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "a", {"epochs": 2}, [press])
    message = capsys.readouterr().err
    assert "checkpoint_dir=" in message
    assert "step-0000000004" in message.replace("\n", "")
    whole, _ = train(tmp_path / "b", {"epochs": 2})
    resumed, report = train(tmp_path / "a", {"epochs": 2})
    assert report.resumed_from == 4
    assert same(full_state(whole), full_state(resumed))


def test_ctrl_c_inside_the_loader(tmp_path):
    class Pressed:
        def __iter__(self):
            yield from batched(X, Y)[:2]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(Fake(), Pressed(), checkpoint_dir=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["step-0000000002-epoch-00000"]


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    def press_twice(event):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, {"epochs": 2}, [press_twice])


SCRIPT = """
import os, signal, sys, torch
sys.path.insert(0, {root!r})
torch.set_num_threads(1)  # as in the fixture
from tests.training.test_resume import train, full_state
from safetensors.torch import save_file
step, directory, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
def kill(event):
    if event.step == step:
        os.kill(os.getpid(), signal.SIGKILL)
fast, report = train(directory, {{"epochs": 2, "checkpoint_every": 2, "scheduler": "cosine"}}, [kill])
save_file(full_state(fast), out)
"""


@pytest.mark.nightly
def test_sigkill_of_a_real_process(tmp_path):
    from safetensors.torch import load_file

    script = SCRIPT.format(root=str(Path(__file__).parents[2]))
    command = [sys.executable, "-c", script]
    kill = subprocess.run([*command, "5", str(tmp_path / "run"), str(tmp_path / "no")], check=False, timeout=120)
    assert kill.returncode == -signal.SIGKILL
    assert not (tmp_path / "no").exists()
    subprocess.run([*command, "-1", str(tmp_path / "run"), str(tmp_path / "resumed")], check=True, timeout=120)
    whole, _ = train(tmp_path / "whole", {"epochs": 2, "checkpoint_every": 2, "scheduler": "cosine"})
    resumed = load_file(tmp_path / "resumed")
    assert all(torch.equal(resumed[n], t) for n, t in full_state(whole).items())


def test_other_settings_are_refused_and_named(tmp_path):
    train(tmp_path, {"epochs": 2})
    with pytest.raises(EecompileError, match="other settings") as error:
        train(tmp_path, {"epochs": 2, "lr": 0.5, "seed": 3})
    assert "lr: 0.001 in the checkpoint, 0.5 now" in str(error.value)
    assert "seed: 0 in the checkpoint, 3 now" in str(error.value)
    with pytest.raises(EecompileError, match="tensors: "):
        fit(Fake(exits=3), loader(), epochs=2, checkpoint_dir=tmp_path)
    train(tmp_path, {"epochs": 2, "lr": 0.5, "resume": False})
    assert train(tmp_path, {"epochs": 2, "lr": 0.5, "resume": "must"})[1].resumed_from == 8
    assert differences({"a": 1}, {"a": 1, "b": 2}) == ["b: None in the checkpoint, 2 now"]


def test_must_resume(tmp_path):
    with pytest.raises(EecompileError, match="no checkpoint to resume"):
        train(tmp_path, {"resume": "must"})


def test_a_shorter_loader_is_noticed(tmp_path):
    class Plain:
        def __init__(self, n):
            self.n = n

        def __iter__(self):
            return iter(batched(X, Y)[: self.n])

    with pytest.raises(Killed):
        fit(Fake(), Plain(4), checkpoint_dir=tmp_path, checkpoint_every=1, callbacks=[kill_at(3)])
    with pytest.raises(EecompileError, match="shorter"):
        fit(Fake(), Plain(2), checkpoint_dir=tmp_path)


@pytest.mark.parametrize("name", ["state.json", "state.safetensors"])
@pytest.mark.parametrize("how", ["truncate", "alter", "remove"])
def test_damaged_checkpoints_are_refused_by_name(tmp_path, name, how):
    train(tmp_path, {"epochs": 1})
    path = sorted(tmp_path.iterdir())[-1] / name
    data = bytearray(path.read_bytes())
    if how == "remove":
        path.unlink()
    elif how == "truncate":
        path.write_bytes(data[: len(data) // 2])
    else:
        place = data.index(b'"sha256": "') + 12 if name == "state.json" else len(data) - 3
        data[place] = ord("x") if data[place] != ord("x") else ord("y")
        path.write_bytes(data)
    with pytest.raises(ArtifactError) as error:
        train(tmp_path, {"epochs": 1})
    assert str(tmp_path) in str(error.value)


def test_a_full_disk_keeps_the_older_checkpoint(tmp_path, monkeypatch):
    real, calls = os.fsync, []

    def full(handle):
        calls.append(handle)
        if len(calls) > 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr("eecompile.training.checkpoint.os.fsync", full)
    with pytest.raises(EecompileError, match="No space left") as error:
        train(tmp_path, {"epochs": 2, "checkpoint_every": 1})
    monkeypatch.undo()
    assert "step-0000000001" in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["step-0000000001-epoch-00000"]
    resumed, report = train(tmp_path, {"epochs": 2})
    assert report.resumed_from == 1
    assert same(full_state(train(tmp_path / "whole", {"epochs": 2})[0]), full_state(resumed))


def test_a_kill_while_writing_leaves_the_older_one(tmp_path, monkeypatch):
    def killed(path, data):
        path.write_bytes(data[:10])
        raise Killed

    train(tmp_path, {"epochs": 1})
    monkeypatch.setattr("eecompile.training.checkpoint._write", killed)
    with pytest.raises(Killed):
        train(tmp_path, {"epochs": 2})
    monkeypatch.undo()
    assert any(p.name.startswith(".partial") for p in tmp_path.iterdir())
    _, report = train(tmp_path, {"epochs": 2})
    assert report.resumed_from == 4
    assert not any(p.name.startswith(".partial") for p in tmp_path.iterdir())


def test_only_the_newest_are_kept_and_nothing_is_pickled(tmp_path):
    train(tmp_path, {"epochs": 3, "checkpoint_every": 1})
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["step-0000000012-epoch-00002", "step-0000000012-epoch-00003"]
    assert {p.name for p in (tmp_path / names[0]).iterdir()} == {"state.json", "state.safetensors"}
    json.loads((tmp_path / names[0] / "state.json").read_text())


def test_checkpoint_dir_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="is a file"):
        Checkpoints(tmp_path / "file")


def test_values_survive_encoding():
    value = {
        "a": [1, 2.5, (None, True, "x")],
        3: {"t": torch.arange(3), "inf": float("inf"), "nan": -float("inf")},
        "empty": {},
    }
    tensors = {}
    text = json.dumps(encode(value, tensors, "v"), allow_nan=False)
    back = decode(json.loads(text), tensors)
    assert torch.equal(back[3].pop("t"), value[3].pop("t"))
    assert back == value
    with pytest.raises(EecompileError, match="without pickle") as error:
        encode({"deep": [object()]}, {}, "optimizer")
    assert "optimizer.deep.0" in str(error.value)


def test_random_state_survives_json():
    tensors = {}
    text = json.dumps(encode(random_state(torch.device("cpu")), tensors, "r"))
    import numpy as np

    draw = lambda: (torch.rand(3).tolist(), random.random(), np.random.rand())  # noqa: E731, NPY002
    wanted = draw()
    draw()
    restore_random_state(decode(json.loads(text), tensors), torch.device("cpu"))
    assert draw() == wanted
