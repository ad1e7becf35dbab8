"""fit: what is trained, what is left alone, stages, early stopping, errors, reports."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import threading

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from eecompile.criteria import Learned
from eecompile.errors import EecompileError
from eecompile.training.fit import fit, objective_of
from eecompile.training.objectives import Exits
from tests.training.fake import Fake, batched, blobs

X, Y = blobs()


def loader(size=8, shuffle=True):
    return DataLoader(TensorDataset(X, Y), batch_size=size, shuffle=shuffle)


def state(fast):
    return {name: tensor.clone() for name, tensor in fast.state_dict().items()}


def changed(before, after):
    """Parts of the network whose tensors differ; not the running statistics of batch norm."""
    names = [name for name in before if "running" not in name and "num_batches" not in name]
    return {name.split(".")[0] for name in names if not torch.equal(before[name], after[name])}


def test_heads_learn_and_the_trunk_stays():
    fast = Fake()
    before = state(fast)
    report = fit(fast, loader(), epochs=15, lr=1e-2)
    assert changed(before, state(fast)) == {"heads"}
    assert report.rows[-1].loss < 0.8 * report.rows[0].loss
    assert report.rows[-1].scores[0] > 0.8
    assert [row.epoch for row in report.rows] == list(range(1, 16))
    assert report.steps == 90
    assert fast.training is True  # a new module is in train mode; fit leaves it as it was
    assert all(p.requires_grad and p.grad is None for p in fast.parameters())


def test_joint_and_two_stage():
    joint, staged = Fake(), Fake()
    before = state(joint)
    report = fit(joint, loader(), epochs=1, trunk=True, lr=1e-2)
    assert changed(before, state(joint)) == {"heads", "blocks", "end"}
    assert [row.stage for row in report.rows] == ["joint"]
    seen = []
    report = fit(
        staged,
        loader(),
        epochs=2,
        two_stage=True,
        lr=1e-2,
        callbacks=[lambda event: seen.append((event.stage, changed(before, state(staged))))],
    )
    assert [row.stage for row in report.rows] == ["trunk", "trunk", "heads", "heads"]
    assert all(what == {"blocks", "end"} for stage, what in seen if stage == "trunk")
    trunk_after = seen_trunk(staged)
    fit(staged, loader(), epochs=1)
    assert all(torch.equal(t, trunk_after[n]) for n, t in seen_trunk(staged).items())


def seen_trunk(fast):
    return {n: t.clone() for n, t in fast.state_dict().items() if n.startswith(("blocks", "end"))}


def test_the_strategy_is_asked():
    fast = Fake(objective={"name": "exits", "distillation": 1.0})
    fast.strategy.joint = True
    assert objective_of(fast) == Exits(distillation=1.0)
    assert [row.stage for row in fit(fast, loader()).rows] == ["joint"]
    fast.strategy.two_stage = True
    assert [row.stage for row in fit(fast, loader()).rows] == ["trunk", "heads"]
    assert [row.stage for row in fit(fast, loader(), trunk=False).rows] == ["heads"]
    assert objective_of(Fake(criterion=Learned())) == Exits(learned=True)


def test_learned_scores_are_trained():
    fast = Fake(criterion=Learned())
    before = state(fast)
    fit(fast, loader(), val_loader=loader())
    assert changed(before, state(fast)) == {"heads", "scorers"}


def test_same_seed_same_parameters_whatever_ran_before():
    a, b, c = Fake(), Fake(), Fake()
    fit(a, loader(), epochs=2, seed=3)
    torch.rand(17)
    fit(b, loader(), epochs=2, seed=3)
    fit(c, loader(), epochs=2, seed=4)
    assert not changed(state(a), state(b))
    assert changed(state(a), state(c))


def test_the_callers_generators_and_mode_are_put_back():
    fast = Fake()
    fast.eval()
    torch.manual_seed(5), random.seed(5), np.random.seed(5)  # noqa: NPY002
    wanted = torch.rand(1), random.random(), np.random.rand()  # noqa: NPY002
    torch.manual_seed(5), random.seed(5), np.random.seed(5)  # noqa: NPY002
    handler = signal.getsignal(signal.SIGINT)
    fit(fast, loader())
    assert (torch.rand(1), random.random(), np.random.rand()) == wanted  # noqa: NPY002
    assert signal.getsignal(signal.SIGINT) is handler
    assert not fast.training


def test_validation_and_early_stopping_keep_the_best_epoch():
    fast = Fake()
    noise = [(x, torch.randint(0, 3, y.shape)) for x, y in batched(X, Y)]
    kept = []
    report = fit(
        fast,
        batched(X, Y),
        epochs=40,
        lr=0.05,
        val_loader=noise,
        patience=2,
        callbacks=[lambda event: event.kind == "epoch" and kept.append(state(fast))],
    )
    losses = [row.val_loss for row in report.rows]
    best = losses.index(min(losses)) + 1
    assert report.stopped_early
    assert report.best_epoch == best
    assert len(losses) == best + 2 < 40
    assert not changed(kept[best - 1], state(fast))


def test_optimizer_schedulers_and_clipping():
    seen = []
    report = fit(
        Fake(),
        loader(),
        epochs=2,
        lr=0.1,
        scheduler="cosine",
        max_grad_norm=0.5,
        optimizer=lambda groups: torch.optim.SGD(groups, momentum=0.9),
        callbacks=[seen.append],
    )
    assert math.isclose(report.rows[0].lr, 0.05)
    assert report.rows[1].lr == pytest.approx(0, abs=1e-12)
    assert [e.kind for e in seen].count("step") == 12
    assert [e.kind for e in seen].count("epoch") == 2
    report = fit(Fake(), loader(), lr=0.1, scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.5))
    assert report.rows[0].lr == pytest.approx(0.1 / 8)


def test_loss_and_metric_of_a_task_that_is_not_classification():
    fast = Fake(classes=2)
    target = X[:, :2]
    metric = lambda prediction, wanted: -(prediction - wanted).square().mean(1)  # noqa: E731
    report = fit(fast, batched(X, target), epochs=2, loss=F.mse_loss, metric=metric, val_loader=batched(X, target))
    assert report.score == "metric"
    assert report.rows[1].val_scores[0] < 0
    assert report.rows[1].val_loss > 0
    assert fit(Fake(classes=2), batched(X, target), loss=F.mse_loss).rows[0].scores is None


def test_own_accelerator_and_hugging_face_batches():
    class Named(Fake):
        def run(self, pixels):
            return super().run(pixels)

    data = [{"pixels": x, "labels": y} for x, y in batched(X, Y)]
    report = fit(Named(), data, accelerator=Accelerator(cpu=True))
    assert report.rows[0].loss > 0
    with pytest.raises(EecompileError, match="gradient accumulation"):
        fit(Named(), data, accelerator=Accelerator(cpu=True, gradient_accumulation_steps=2))


def test_report():
    report = fit(Fake(), loader(), epochs=2, val_loader=loader(), progress=True)
    loaded = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert loaded["exits"] == ["exit_0", "exit_1"]
    assert len(loaded["rows"]) == 2
    assert "exit_0" in str(report)
    assert "validation" in str(report)


def test_empty_loaders():
    with pytest.raises(EecompileError, match="training loader is empty"):
        fit(Fake(), [])
    with pytest.raises(EecompileError, match="val_loader is empty"):
        fit(Fake(), loader(), val_loader=[])
    with pytest.raises(EecompileError, match="read only once"):
        fit(Fake(), iter(batched(X, Y)), epochs=2)
    assert fit(Fake(), iter(batched(X, Y))).steps == 6


def test_bad_labels_are_found_before_the_step():
    fast = Fake()
    data = batched(X, Y)
    data[3] = (data[3][0], data[3][1] + 1)
    steps = []
    with pytest.raises(EecompileError, match="out of range") as error:
        fit(fast, data, callbacks=[steps.append])
    assert "batch 3" in str(error.value)
    assert len(steps) == 3
    assert all(p.grad is None for p in fast.parameters())


def test_nan_loss_stops_with_the_last_checkpoint(tmp_path):
    fast = Fake()
    data = batched(X.clone(), Y)
    data[4][0][2, 1] = float("nan")
    kept = []
    with pytest.raises(EecompileError, match="not finite") as error:
        fit(
            fast,
            data,
            checkpoint_dir=tmp_path,
            checkpoint_every=3,
            callbacks=[lambda e: kept.append(state(fast))],
        )
    assert "batch 4" in str(error.value)
    assert "step-0000000003" in str(error.value)
    assert not changed(kept[-1], fast.state_dict())


def test_nan_gradient_stops():
    class Sneaky(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return g * float("nan")

    fast = Fake()
    loss = lambda output, labels: F.cross_entropy(Sneaky.apply(output), labels)  # noqa: E731
    before = state(fast)
    with pytest.raises(EecompileError, match="gradient is not finite"):
        fit(fast, loader(), loss=loss)
    assert all(torch.equal(p, before[n]) for n, p in fast.named_parameters())


def test_nothing_to_train():
    fast = Fake()
    for p in fast.heads.parameters():
        p.requires_grad_(False)
    with pytest.raises(EecompileError, match="nothing to train"):
        fit(fast, loader())


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"epochs": 0}, "epochs"),
        ({"epochs": 1.5}, "epochs"),
        ({"lr": -1.0}, "lr"),
        ({"lr": float("nan")}, "lr"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"max_grad_norm": 0.0}, "max_grad_norm"),
        ({"resume": "yes"}, "resume"),
        ({"patience": 2}, "val_loader"),
        ({"checkpoint_every": 2}, "checkpoint_dir"),
        ({"resume": "must"}, "checkpoint_dir"),
        ({"scheduler": "cosin"}, "did you mean cosine"),
        ({"loss": F.cross_entropy, "objective": "distillation"}, "both"),
        ({"objective": "nothing"}, "unknown objective"),
        ({"optimizer": lambda groups: 3}, "torch optimizer"),
    ],
)
def test_bad_options(options, text):
    with pytest.raises(EecompileError, match=text):
        fit(Fake(), loader(), **options)


def test_cosine_needs_a_length():
    class Endless:
        def __iter__(self):
            return iter(batched(X, Y))

    assert fit(Fake(), Endless(), epochs=2).steps == 12
    with pytest.raises(EecompileError, match="__len__"):
        fit(Fake(), Endless(), scheduler="cosine")


def test_works_outside_of_the_main_thread():
    failed = []

    def work():
        try:
            fit(Fake(), loader())
        except Exception as error:  # noqa: BLE001
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failed


def test_ctrl_c_without_checkpoints_keeps_what_was_trained(capsys):
    fast = Fake()
    before = state(fast)

    def press(event):
        if event.step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        fit(fast, loader(), callbacks=[press])
    assert changed(before, state(fast)) == {"heads"}
    assert "stopped by Ctrl-C" in capsys.readouterr().err
