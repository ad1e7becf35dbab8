"""`backend="onnxruntime"`: segments of `compact` in ONNX Runtime, against the reference."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from eecompile import MissingDependencyError, StrategyError, eecompile, load, strategies
from eecompile.cli.app import app
from eecompile.passes import find_token_parts
from eecompile.runtime.onnx_runtime import OnnxSegment
from tests.export.cases import put, undecided
from tests.export.test_pt2 import REFUSED
from tests.kinds import KINDS
from tests.support import CLOSED, both, nightly, run_by, same_result, spreading_thresholds

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
ONNX = "onnxruntime"
SIZES = (1, 2, 5, 64)
QUICK = ("gates", "router to exits")
KIND = [pytest.param(k, marks=() if k in QUICK else pytest.mark.nightly) for k in KINDS if k not in REFUSED]


@pytest.mark.parametrize("name", KIND)
def test_a_kind_is_the_reference_at_every_batch_size(name: str) -> None:
    kind = KINDS[name]
    fast = kind.build().fast
    undecided(fast)
    put(fast, "random 1", *kind.call(16, 3))
    fast.backend = ONNX
    for size in SIZES:
        args, kwargs = kind.call(size, 3)
        same_result(*both(fast, *args, **kwargs))


@pytest.mark.parametrize("name", ["lenet", nightly("hf_resnet"), nightly("bert")])
def test_a_model_is_the_reference_and_only_survivors_go_on(zoo: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    animal = zoo(name)
    fast = animal.fast
    args, kwargs = animal.entry.inputs(64, seed=5)
    settings = fast.settings
    try:
        fast.set_thresholds(1.0)
        confidences = fast.observe(*args, **kwargs).confidences
        fast.set_thresholds(spreading_thresholds(confidences[:-1]))
        fast.backend = ONNX
        rows: list[int] = []
        call = OnnxSegment.__call__

        def counted(self: OnnxSegment, *inputs: Tensor) -> tuple[Tensor, ...]:
            rows.append(max(t.shape[0] for t in inputs if t.ndim))
            return call(self, *inputs)

        monkeypatch.setattr(OnnxSegment, "__call__", counted)
        for size in SIZES:
            args, kwargs = animal.entry.inputs(size, seed=5)
            compact, reference = both(fast, *args, **kwargs)
            same_result(compact, reference)
        found = compact.exit_index
        assert len(found.unique()) == len(fast.exits) + 1
        assert rows[-len(fast.exits) - 1 :] == [int((found >= k).sum()) for k in range(len(fast.exits) + 1)]
    finally:
        fast.backend, fast.settings = "eager", settings


def tower() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[m for _ in range(4) for m in (nn.Linear(8, 8), nn.ReLU(inplace=True))], nn.Linear(8, 3)).eval()


@pytest.fixture(scope="module")
def made() -> tuple[Any, nn.Module, Tensor]:
    model, x = tower(), torch.randn(16, 8)
    fast = eecompile(model, strategies.Branchy(exits=("3",)), example_inputs=(x,), backend=ONNX)
    fast.set_thresholds(CLOSED)
    run_by("compact", fast, x)
    return fast, model, x


def loaded(model: nn.Module, assign: bool) -> None:
    model.load_state_dict({k: 1.1 * v for k, v in model.state_dict().items()}, assign=assign)


def written(model: nn.Module) -> None:
    with torch.no_grad():
        model[2].weight[3, 4] += 1.0


CHANGES: dict[str, Callable[[Any], Any]] = {
    "one value is written": written,
    "past the counter of writes": lambda model: model[8].weight.data.mul_(0.9),
    "another tensor": lambda model: setattr(model[4].weight, "data", torch.randn(8, 8)),
    "loaded": lambda model: loaded(model, assign=False),
    "loaded in place of it": lambda model: loaded(model, assign=True),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_weights_are_seen_by_the_next_call(made: tuple[Any, nn.Module, Tensor], change: str) -> None:
    fast, model, x = made
    before = run_by("compact", fast, x).output
    CHANGES[change](model)
    compact, reference = both(fast, x)
    same_result(compact, reference)
    assert not torch.equal(compact.output, before)


def test_writes_past_the_counter_are_seen_wherever_they_are(made: tuple[Any, nn.Module, Tensor]) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3)).eval(), made[2]
    fast = eecompile(model, strategies.Branchy(exits=("1",)), example_inputs=(x,), backend=ONNX)
    with torch.no_grad():
        fast(x)
        model[2].weight.data[:, 1:] *= 2  # all columns but one
        torch.testing.assert_close(fast(x), model(x))


class Floored(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + x.abs() // 0.3


def test_operators_that_are_defined_otherwise_are_refused_where_they_show() -> None:
    model, x = tower(), torch.full((4, 8), 1.5)
    model.insert(0, Floored())
    fast = eecompile(model, strategies.Branchy(exits=("4",)), example_inputs=(x,), backend=ONNX)
    with pytest.raises(StrategyError, match="something else than torch"), torch.no_grad():
        fast(x)


def test_what_it_cannot_do_is_refused(made: tuple[Any, nn.Module, Tensor]) -> None:
    fast, _, x = made
    with pytest.raises(StrategyError, match="no gradients") as refused:
        fast(x)
    assert "torch.no_grad()" in str(refused.value)
    with pytest.raises(StrategyError, match="under autocast"), torch.no_grad(), torch.autocast("cpu"):
        fast(x)
    with torch.inference_mode():
        assert fast(x).shape == (16, 3)
    fast.backend = "eager"
    fast(x).sum().backward()
    fast.backend = ONNX


class Bessel(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(x)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda model: model.double(), "computes in float32"),
        (lambda model: model.bfloat16(), "computes in float32"),
        (lambda model: model.insert(7, Bessel()), "cannot run this program"),
    ],
)
def test_programs_without_a_form_in_it_are_refused(change: Callable[[nn.Module], Any], says: str) -> None:
    model = tower()
    change(model)
    x = torch.randn(4, 8, dtype=next(model.parameters()).dtype)
    fast = eecompile(model, strategies.Branchy(exits=("3",)), example_inputs=(x,), backend=ONNX)
    with pytest.raises(StrategyError, match=says) as refused, torch.no_grad():
        fast(x)
    assert 'fast.backend = "eager"' in str(refused.value)
    fast.backend = "eager"
    fast(x)


@pytest.mark.nightly
def test_halting_per_position_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(find_token_parts, "MOVING", 0.0)  # the model is too small for it to pay
    kind = KINDS["halting per position"]
    fast = kind.build().fast
    undecided(fast)
    fast.backend = ONNX
    args, kwargs = kind.call(4, 3)
    with pytest.raises(StrategyError, match="per_token=False"), torch.no_grad():
        fast(*args, **kwargs)


def test_blocks_are_refused() -> None:
    blocks = KINDS["captured as blocks"].build().fast
    with pytest.raises(StrategyError, match="captured as blocks"):
        blocks.backend = ONNX
    assert blocks.backend == "eager"


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eecompile.runtime.compact.PACKAGES", ("no_such_package",))
    with pytest.raises(MissingDependencyError, match=r"pip install 'eecompile\[onnx\]'"):
        eecompile(tower(), strategies.Branchy(exits=("3",)), example_inputs=(torch.randn(4, 8),), backend=ONNX)


def test_it_is_saved_and_loaded_and_shown(made: tuple[Any, nn.Module, Tensor], tmp_path: Path) -> None:
    fast, _, x = made
    fast.save(tmp_path / "p")
    again = load(tmp_path / "p")
    assert again.backend == ONNX
    assert again.explain().to_dict()["backend"] == ONNX
    same_result(run_by("compact", again, x), run_by("reference", fast, x))
    done = CliRunner().invoke(app, ["run", str(tmp_path / "p"), "--input", "float32[5,8]", "--json"])
    assert done.exit_code == 0, done.output
    streamed = CliRunner().invoke(
        app, ["run", str(tmp_path / "p"), "--input", "float32[5,8]", "--stream", "--threshold", "1"]
    )
    assert streamed.exit_code == 0, streamed.output


def test_views_are_the_reference(made: tuple[Any, nn.Module, Tensor]) -> None:
    """Whatever a tensor's memory looks like: strides, offsets, and the bit that says it is to be negated."""
    fast, _, x = made
    fast.backend = ONNX
    views = {
        "negated": torch._neg_view(-x),  # type: ignore[attr-defined]
        "imaginary part of a conjugate": torch.complex(x, -x).conj().imag,
        "transposed": x.transpose(0, 1).contiguous().transpose(0, 1),
        "every second": torch.stack([x, x], -1)[..., 0],
        "expanded": x[:1].expand_as(x),
        "offset": torch.cat([x, x])[len(x) :],
    }
    with torch.no_grad():
        for name, view in views.items():
            assert torch.equal(fast(view), fast(view.clone().contiguous().resolve_neg())), name


def test_transforms_of_torch_func_are_refused(made: tuple[Any, nn.Module, Tensor]) -> None:
    fast, _, x = made
    fast.backend = ONNX
    with pytest.raises(StrategyError, match="ordinary tensors, and this call is under vmap"), torch.no_grad():
        torch.vmap(fast)(torch.stack([x, x]))
