"""Weights have one truth: wherever they are replaced, in the compiled module or in the original, the next call uses them."""

from __future__ import annotations

import copy
import io
import pickle
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel

from eecompile import CaptureError, EecompileError, load, strategies
from eecompile.runtime.changed import _read_by
from tests.random_models import specs
from tests.support import CLOSED, Fingerprint, both, equal_bits, executor, nightly, same_result, spreading_thresholds
from tests.support import compiled as eecompile
from tests.test_properties import bounded


class Mixed(nn.Module):
    """Parameters, buffers and constants at the root and below; `[B, 8]` to `[B, 4]`."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.randn(8))
        self.register_buffer("scale", torch.rand(8) + 0.5, persistent=False)
        self.token = nn.Parameter(torch.randn(8))
        self.constant = torch.randn(8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU()) for _ in range(4))
        self.last = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.scale + self.shift * self.token + self.constant
        for block in self.blocks:
            x = block(x)
        return self.last(x)


def made(executor: str = "auto") -> tuple[Any, nn.Module, Tensor]:
    torch.manual_seed(0)
    model, x = Mixed().eval(), torch.randn(24, 8)
    fast = eecompile(model, strategies.Branchy(exits=2), example_inputs=(x,), executor=executor)
    fast.set_thresholds(CLOSED)
    fast(x)
    return fast, model, x


def other(tensors: dict[str, Tensor], seed: int = 1) -> dict[str, Tensor]:
    """Other values for weights, as fits running variances too."""
    g = torch.Generator().manual_seed(seed)
    return {
        n: torch.rand(t.shape, generator=g) + 0.1 if t.is_floating_point() and not n.startswith(SETTINGS) else t.clone()
        for n, t in tensors.items()
    }


SETTINGS = tuple(f"graph_module.eecompile_{name}" for name in ("thresholds", "temperatures", "constants"))


def of_model(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a state of the compiled module says of the model."""
    own = {n.removeprefix("graph_module.").removeprefix("eecompile_root."): t for n, t in state.items()}
    return {n: t for n, t in own.items() if not n.startswith("eecompile_")}


def loaded_into_compiled(fast: Any, model: nn.Module, assign: bool) -> None:
    fast.load_state_dict(other(fast.state_dict()), assign=assign)


def loaded_into_model(fast: Any, model: nn.Module, assign: bool) -> None:
    model.load_state_dict(other(model.state_dict()), assign=assign)


def replaced(fast: Any, model: nn.Module, assign: bool) -> None:
    model.last.weight = nn.Parameter(torch.ones_like(model.last.weight))
    model.shift = torch.full_like(model.shift, 0.3)
    model.blocks[1][1].running_mean = torch.full_like(model.shift, 0.1)


CHANGES = {"compiled": loaded_into_compiled, "model": loaded_into_model, "replaced": replaced}


def follows(fast: Any, model: nn.Module, x: Tensor) -> None:
    """Closed every way to run gives the model's bits; open, executors agree."""
    fast.set_thresholds(CLOSED)
    with torch.no_grad():
        want = model(x)
        equal_bits(fast.full(x), want)
        for name in ("compact", "reference", "simulate"):
            with executor(fast, name):
                equal_bits(fast(x), want)
        fast.set_thresholds(spreading_thresholds(fast.observe(x).confidences[:-1]))
        same_result(*both(fast, x))


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_new_weights(change: Callable[..., None], assign: bool) -> None:
    fast, model, x = made()
    before = fast(x)
    change(fast, model, assign)
    assert not torch.equal(fast(x), before)
    follows(fast, model, x)


def test_new_weights_are_trained_and_saved(tmp_path) -> None:
    fast, model, x = made()
    model.load_state_dict(other(model.state_dict()), assign=True)
    fast.train_trunk = True
    fast.fit([(x, torch.randint(0, 4, (24,)))], epochs=1)
    follows(fast, model, x)
    fast.save(tmp_path / "program")
    equal_bits(load(tmp_path / "program")(x), fast(x))


def test_states_of_compiled_and_loaded_have_the_same_names(tmp_path) -> None:
    fast, model, x = made()
    assert of_model(fast.state_dict()).keys() == model.state_dict().keys()
    fast.save(tmp_path / "program")
    loaded = load(tmp_path / "program")
    assert loaded.state_dict().keys() == fast.state_dict().keys()
    model.load_state_dict(other(model.state_dict()))
    loaded.load_state_dict(fast.state_dict(), assign=True)
    equal_bits(loaded(x), fast(x))
    equal_bits(loaded.full(x), fast.full(x))


@pytest.mark.parametrize("name", ["compact", "reference"])
def test_functional_call(name: str) -> None:
    fast, model, x = made(name)
    before = fast(x)
    given = other(dict(fast.named_parameters()) | dict(fast.named_buffers()))
    inside = functional_call(fast, given, (x,))
    equal_bits(inside, functional_call(model, of_model(given), (x,)))
    equal_bits(fast(x), before)
    if name == "reference":  # its operators have no rules for torch.func
        return

    def loss(parameters: dict[str, Tensor], module: nn.Module) -> Tensor:
        return functional_call(module, parameters, (x,)).square().sum()

    got = torch.func.grad(loss)(dict(fast.named_parameters()), fast)
    want = torch.func.grad(loss)(dict(model.named_parameters()), model)
    torch.testing.assert_close(of_model(got), want)
    equal_bits(fast(x), before)


def test_a_first_call_within_functional_call_leaves_nothing() -> None:
    torch.manual_seed(0)
    model, x = Mixed().eval(), torch.randn(24, 8)
    fast = eecompile(model, strategies.Branchy(exits=2), example_inputs=(x,))
    fast.set_thresholds(CLOSED)
    functional_call(fast, other(dict(fast.named_parameters())), (x,))
    follows(fast, model, x)


def test_a_deep_copy_is_independent() -> None:
    fast, model, x = made()
    before = fast(x)
    module, twin = copy.deepcopy([model, fast])
    assert twin.original is module
    twin.load_state_dict(other(twin.state_dict()), assign=True)
    follows(twin, module, x)
    equal_bits(fast(x), before)
    follows(fast, model, x)
    twin.fit([(x, torch.randint(0, 4, (24,)))], epochs=1, trunk=True, train_in_place=True)
    follows(twin, module, x)
    follows(fast, model, x)


def test_a_deep_copy_of_a_loaded_program(tmp_path) -> None:
    fast, _, x = made()
    fast.save(tmp_path / "program")
    loaded = load(tmp_path / "program")
    twin = copy.deepcopy(loaded)
    twin.load_state_dict(other(twin.state_dict()), assign=True)
    equal_bits(loaded(x), fast(x))
    assert not torch.equal(twin(x), fast(x))
    equal_bits(twin(x), twin.full(x))


def test_averages_of_weights() -> None:
    fast, model, x = made()
    mine, theirs = AveragedModel(fast, use_buffers=True), AveragedModel(model, use_buffers=True)
    for seed in (1, 2):
        model.load_state_dict(other(model.state_dict(), seed))
        mine.update_parameters(fast)
        theirs.update_parameters(model)
    torch.testing.assert_close(mine(x), theirs(x))
    assert not torch.allclose(mine(x), fast(x))
    equal_bits(fast(x), model(x))


@pytest.mark.parametrize("through", ["pickle", "torch.save"])
def test_pickled_as_a_program(through: str) -> None:
    fast, _, x = made()
    fast.set_thresholds(spreading_thresholds(fast.observe(x).confidences[:-1]))
    buffer = io.BytesIO()
    if through == "pickle":
        twin = pickle.loads(pickle.dumps(fast))
    else:
        torch.save(fast, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    same_result(twin.run(x), fast.run(x))


def test_a_shallow_copy_shares_everything() -> None:
    fast, _, x = made()
    twin = copy.copy(fast)
    assert [id(p) for p in twin.parameters()] == [id(p) for p in fast.parameters()]
    equal_bits(twin(x), fast(x))


def test_the_model_keeps_what_is_its_own() -> None:
    torch.manual_seed(0)
    model, x = Mixed().eval(), torch.randn(24, 8)
    before = Fingerprint.of(model)
    fast = eecompile(model, strategies.Branchy(exits=2), example_inputs=(x,))
    fast(x)
    fast.to("cpu")
    fast.training_graphs.train_program()
    before.check(model)


def test_in_another_module_that_torch_compiles() -> None:
    fast, model, x = made()
    fast.set_thresholds(spreading_thresholds(fast.observe(x).confidences[:-1]))
    compiled = torch.compile(nn.Sequential(nn.Identity(), fast), backend="eager")
    with torch.no_grad():
        equal_bits(compiled(x), fast(x))
        equal_bits(torch.compile(fast, backend="eager")(x), fast(x))
        fast.set_thresholds(CLOSED)
        equal_bits(compiled(x), model(x))


TRACES = {
    "torch.export": lambda fast, x: torch.export.export(fast, (x,), strict=False),
    "torch.jit.trace": lambda fast, x: torch.jit.trace(fast, (x,)),
}


@pytest.mark.parametrize("by", TRACES)
@pytest.mark.filterwarnings("ignore:`torch.jit.trace")
def test_traces_are_refused(by: str) -> None:
    fast, _, x = made()
    with pytest.raises(EecompileError, match=f"cannot be exported by {by}"):
        TRACES[by](fast, x)


def test_distributed_data_parallel() -> None:
    fast, model, x = made()
    with tempfile.NamedTemporaryFile() as file:
        dist.init_process_group("gloo", init_method=f"file://{file.name}", rank=0, world_size=1)
        try:
            parallel = DistributedDataParallel(fast)
            equal_bits(parallel(x), model(x))
            parallel(x).sum().backward()
        finally:
            dist.destroy_process_group()
    assert all(p.grad is not None for p in model.parameters())


def test_replicas_are_refused() -> None:
    fast, _, _ = made()
    with pytest.raises(EecompileError, match="DistributedDataParallel"):
        fast._replicate_for_data_parallel()


def test_every_name_that_is_listed_can_be_read() -> None:
    fast, _, _ = made()
    for name in dir(fast):
        getattr(fast, name)
    assert not hasattr(fast, "no_such_name")


@bounded(8)
@given(spec=specs(), change=st.sampled_from(["assign", "copy", "functional", "deepcopy"]), seed=st.integers(0, 999))
def test_random_models_follow_random_changes(spec, change: str, seed: int) -> None:
    model = spec.model()
    options = {"prediction": "logits"} if spec.further else {}
    call = spec.call(4, 6, seed)
    fast = eecompile(model, strategies.Branchy(exits=2), example_kwargs=call, batch_axis=spec.batch_axis, **options)
    fast.set_thresholds(CLOSED)
    with torch.no_grad():
        fast(**call)
        if change == "deepcopy":
            model, fast = copy.deepcopy((model, fast))
        given = other(dict(model.state_dict()), seed)
        if change == "functional":
            named = {n: given[n.removeprefix("graph_module.")] for n, _ in fast.named_parameters() if "eecompile" not in n}
            got = functional_call(fast, named, (), call)
            want = functional_call(model, {n: given[n] for n, _ in model.named_parameters()}, (), call)
        else:
            model.load_state_dict(given, assign=change == "assign")
            got, want = fast(**call), model(**call)
        torch.testing.assert_close(got, want, equal_nan=True)


class Adapter(nn.Module):
    """A linear layer with a low-rank update next to it or merged into its weight, as PEFT has."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.down, self.up = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)
        self.merged_adapters: list[str] = []
        self.disabled = False
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y = self.base_layer(x)
        return y if self.disabled or self.merged_adapters else y + self.up(self.down(x))

    @torch.no_grad()
    def merge(self, sign: int = 1) -> None:
        self.base_layer.weight.data += sign * self.up.weight @ self.down.weight
        self.merged_adapters = ["default"] if sign > 0 else []


def adapted() -> tuple[Any, Mixed, Tensor]:
    torch.manual_seed(0)
    model, x = Mixed().eval(), torch.randn(24, 8)
    model.blocks[1][0] = Adapter(model.blocks[1][0])
    fast = eecompile(model, strategies.Branchy(exits=2), example_inputs=(x,))
    fast.set_thresholds(CLOSED)
    return fast, model, x


def test_an_adapter_that_is_merged_or_switched_off_is_refused() -> None:
    fast, model, x = adapted()
    adapter = model.blocks[1][0]
    with torch.no_grad():
        adapter.up.weight.mul_(3.0)
        for change, undo in ((adapter.merge, lambda: adapter.merge(-1)), *[_switch(adapter)]):
            equal_close(fast(x), model(x))
            change()
            with pytest.raises(EecompileError, match=r"has changed since it was compiled[\s\S]*blocks\.1\.0"):
                fast(x)
            undo()
        equal_close(fast(x), model(x))


def _switch(adapter: Adapter) -> tuple[Callable[[], None], Callable[[], None]]:
    return (lambda: setattr(adapter, "disabled", True), lambda: setattr(adapter, "disabled", False))


def equal_close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want)


def test_a_module_that_is_replaced_is_refused() -> None:
    for replace in (Adapter, lambda m: nn.Linear(8, 4)):
        fast, model, x = made()
        model.last = replace(model.last)
        with pytest.raises(EecompileError, match=r"has changed since it was compiled[\s\S]*last"):
            fast(x)


SCALE = 1.0


@dataclass
class Setup:
    shift: float = 1.0


@dataclass(slots=True)
class Slots:
    shift: float = 0.0
    bounds: tuple[float, float] = (-9.0, 9.0)


class Scaled:
    """A mixin without a `forward`."""

    def scaled(self, x: Tensor) -> Tensor:
        return self.by(x)

    def by(self, x: Tensor) -> Tensor:
        return x


class Reads(Scaled, nn.Module):
    """[B, 8] -> [B, 3]: reads all kinds of state that is neither a parameter nor a buffer."""

    factor = gain = 1.0

    @property
    def gained(self) -> float:
        return self.gain

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(8))
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.out = nn.Linear(8, 3)
        self.setup = Setup()
        self.offset = torch.zeros(8)
        self.norm, self.act = nn.LayerNorm(8), torch.tanh
        self.first.register_forward_hook(lambda _, given, out: out + 1)
        self.version, self.table = -1, torch.empty(0)
        self.slots, self.number = Slots(), torch.zeros(())
        self.options: Any = {"a": 1.0, "t": torch.ones(8), "deep": [{"b": [1.0, 1.0]}]}
        self.steps: Any = [torch.sin, nn.Softsign()]
        self.many = [1.0] * 64
        self.parts = nn.Sequential(nn.Linear(8, 8), nn.Softplus())

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.options["a"] * self.options["t"] * self.options["deep"][0]["b"][1] * self.many[63]
        x = (x + self.slots.shift + self.number.tolist()).clamp(*self.slots.bounds)
        for step in self.steps:
            x = step(x)
        x = self.parts(self.scaled(x))
        if self.version != self.weight._version:
            self.version, self.table = self.weight._version, self.weight.softmax(0).detach()
        x = x * self.factor * self.gained * SCALE * self.table + self.setup.shift + self.offset
        x = self.norm(self.second(self.first(x).relu()))
        out: Tensor = self.out(helper(self.act(self.mixed(x))))
        return out

    def mixed(self, x: Tensor) -> Tensor:
        return x


def helper(x: Tensor) -> Tensor:
    return x


class Mixing(Reads):
    def mixed(self, x: Tensor) -> Tensor:
        return -x


def _hook(m: Reads) -> None:
    m.first._forward_hooks.clear()
    m.first.register_forward_hook(lambda _, given, out: out - 1)


def _global(model: nn.Module) -> None:
    global SCALE
    SCALE = 2.0


def _assigned(model: nn.Module) -> None:
    model.load_state_dict({n: t * (1 + i) for i, (n, t) in enumerate(model.state_dict().items())}, assign=True)


def _negated(self: Any, x: Tensor) -> Tensor:
    return -x


def _reordered(m: Reads) -> None:
    first = m.parts._modules.pop("0")
    m.parts._modules["0"] = first


class Plainer(Reads):
    """A subclass that adds nothing."""


PATCH: Any = None
PYTHON: dict[str, Callable[[Any], Any]] = {
    "an attribute of the class, set on the model": lambda m: setattr(m, "factor", 2.0),
    "an attribute that a property reads": lambda m: setattr(m, "gain", 2.0),
    "an attribute of a config": lambda m: setattr(m.setup, "shift", 2.0),
    "a tensor that is no buffer": lambda m: setattr(m, "offset", torch.ones(8)),
    "a global": _global,
    "a hook": lambda m: m.first.register_forward_hook(lambda _, given, out: 2 * out),
    "a forward of its own": lambda m: setattr(m.first, "forward", lambda x: x),
    "a table made of weights": lambda m: m.weight.add_(torch.arange(8.0)),
    "a number of a module of torch": lambda m: setattr(m.norm, "eps", 1.0),
    "a function kept as an attribute": lambda m: setattr(m, "act", torch.sigmoid),
    "one hook in the place of another": _hook,
    "another class of a module": lambda m: setattr(m, "__class__", Mixing),
    "another function of a class": lambda m: PATCH.setattr(Reads, "mixed", lambda self, x: -x),
    "another forward of a class of torch": lambda m: PATCH.setattr(nn.LayerNorm, "forward", lambda self, x: x),
    "a function that code names": lambda m: PATCH.setitem(globals(), "helper", torch.neg),
    "another config": lambda m: setattr(m, "setup", Setup(2.0)),
    "a number next to a tensor": lambda m: m.options.update(a=2.0),
    "a tensor next to a number": lambda m: m.options.update(t=-torch.ones(8)),
    "a number three containers deep": lambda m: m.options["deep"][0]["b"].__setitem__(1, -1.0),
    "one of many numbers": lambda m: m.many.__setitem__(63, 2.0),
    "one of several functions": lambda m: m.steps.__setitem__(0, torch.cos),
    "a module in a list": lambda m: m.steps.__setitem__(1, nn.Tanh()),
    "an attribute in a slot": lambda m: setattr(m.slots, "shift", 2.0),
    "a pair in a slot": lambda m: setattr(m.slots, "bounds", (0.0, 0.1)),
    "a tensor changed in place": lambda m: m.number.fill_(2.0),
    "a function of a mixin": lambda m: PATCH.setattr(Scaled, "by", _negated),
    "a function of the base": lambda m: PATCH.setattr(Reads, "mixed", _negated),
    "a function that the subclass has now": lambda m: PATCH.setattr(Plainer, "mixed", _negated, raising=False),
    "a property of the base": lambda m: PATCH.setattr(Reads, "gained", property(lambda self: 2.0)),
    "a function of the model itself": lambda m: setattr(m, "mixed", MethodType(_negated, m)),
    "a mixin's, of the model itself": lambda m: setattr(m, "by", MethodType(_negated, m)),
    "the order of modules": _reordered,
    "weights that were shared": lambda m: setattr(m.second, "weight", nn.Parameter(torch.ones(8, 8))),
    "shared weights that were assigned": _assigned,
}


def plainer() -> Any:
    model, x = Plainer().eval(), torch.randn(4, 8)
    with torch.no_grad():
        model(x)  # its table is made
    return eecompile(model, strategies.Branchy(exits=1), example_inputs=(x,))


@pytest.fixture(scope="module")
def of_plainer() -> Any:
    return plainer()


@pytest.mark.parametrize(
    ("copied", "name"),
    [(True, name) for name in PYTHON] + [nightly(False, n) if i % 4 else (False, n) for i, n in enumerate(PYTHON)],
)
def test_other_state_that_python_reads_is_refused(
    monkeypatch: pytest.MonkeyPatch, of_plainer: Any, name: str, copied: bool
) -> None:
    monkeypatch.setitem(globals(), "SCALE", 1.0)
    monkeypatch.setitem(globals(), "PATCH", monkeypatch)
    fast, x = copy.deepcopy(of_plainer) if copied else plainer(), torch.randn(4, 8)
    with torch.no_grad():
        running: Any = fast.original
        equal_bits(fast(x), running(x))
        assert fast.entry.watch._objects.same and fast.entry.watch._attributes.same and fast.entry.watch._plain.same
        PYTHON[name](running)
        with pytest.raises(CaptureError, match="has changed since it was compiled"):
            fast(x)


CONV = {"stride", "padding", "dilation", "groups"}
POOL = {"kernel_size", "stride", "padding"}
OF_TORCH: dict[nn.Module, set[str]] = {
    nn.Conv1d(2, 2, 1): CONV,
    nn.Conv2d(2, 2, 1): CONV,
    nn.Conv3d(2, 2, 1): CONV,
    nn.ConvTranspose1d(2, 2, 1): CONV | {"output_padding"},
    nn.ConvTranspose2d(2, 2, 1): CONV | {"output_padding"},
    nn.MaxPool2d(2): POOL | {"dilation", "ceil_mode"},
    nn.AvgPool1d(2): POOL | {"count_include_pad"},
    nn.AvgPool2d(2): POOL | {"count_include_pad", "divisor_override"},
    nn.AdaptiveAvgPool2d(1): {"output_size"},
    nn.LPPool2d(2, 2): {"norm_type", "kernel_size", "stride"},
    nn.BatchNorm2d(2): {"eps", "momentum"},
    nn.GroupNorm(1, 2): {"eps", "num_groups"},
    nn.LayerNorm(2): {"eps", "normalized_shape"},
    nn.InstanceNorm1d(2): {"eps"},
    nn.RMSNorm(2): {"eps", "normalized_shape"},
    nn.LSTM(2, 2): {"num_layers", "bidirectional", "batch_first"},
    nn.GRU(2, 2): {"num_layers", "bidirectional", "batch_first"},
    nn.RNN(2, 2): {"mode", "num_layers", "bidirectional", "batch_first"},
    nn.LeakyReLU(): {"negative_slope"},
    nn.ELU(): {"alpha"},
    nn.GELU(): {"approximate"},
    nn.Hardtanh(): {"min_val", "max_val"},
    nn.Softmax(-1): {"dim"},
    nn.MultiheadAttention(2, 1): {"num_heads", "embed_dim", "batch_first", "add_zero_attn"},
    nn.TransformerEncoderLayer(2, 1): {"norm_first", "activation"},
    nn.Embedding(2, 2): {"padding_idx", "max_norm", "norm_type"},
    nn.Upsample(2): {"size", "scale_factor", "mode", "align_corners"},
    nn.Flatten(): {"start_dim", "end_dim"},
    nn.PixelShuffle(1): {"upscale_factor"},
}


@pytest.fixture(scope="module")
def of_convolutions() -> Any:
    made = {}
    for dims, conv in ((1, nn.Conv1d), (2, nn.Conv2d)):
        torch.manual_seed(0)
        rest = [m for _ in range(3) for m in (conv(4, 32, 3, padding=1), nn.ReLU(), conv(32, 4, 1))]
        model = nn.Sequential(conv(4, 4, 3, padding=1), *rest, AllMean(), nn.Linear(4, 3)).eval()
        x = torch.randn(4, 4, *[8] * dims)
        fast = eecompile(model, strategies.Branchy(exits=1), example_inputs=(x,))
        fast.set_thresholds(CLOSED)
        made[dims] = fast, x
    return made


class AllMean(nn.Module):
    """[B, C, ...] -> [B, C]."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).mean(2)


@pytest.mark.parametrize("layer", OF_TORCH, ids=lambda layer: type(layer).__name__)
def test_numbers_of_modules_of_torch_are_read(layer: nn.Module) -> None:
    """Every attribute that a repr names and a call reads is looked at."""
    missing = OF_TORCH[layer] - _read_by(type(layer))
    assert not missing


CONVOLUTIONS: dict[str, Any] = {"padding": (0,), "dilation": (2,), "stride": (2,), "groups": 2}


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("dims", [1, 2])
def test_another_convolution_is_refused(of_convolutions: Any, dims: int, name: str) -> None:
    fast, x = copy.deepcopy(of_convolutions[dims])
    value = CONVOLUTIONS[name]
    equal_bits(fast(x), fast.original(x))
    setattr(fast.original[0], name, value * dims if isinstance(value, tuple) else value)
    with pytest.raises(CaptureError, match=rf"has changed since it was compiled[\s\S]*0\.{name}"):
        fast(x)


def test_an_attribute_that_is_deleted_and_a_hook_that_only_looks_are_let_pass() -> None:
    model = Reads().eval()
    model.nothing = 3
    x, seen = torch.randn(4, 8), list[Tensor]()
    with torch.no_grad():
        fast = eecompile(model, strategies.Branchy(exits=1), example_inputs=(x,))
        del model.nothing
        model.first.register_forward_hook(lambda _, given, out: seen.append(out))
        equal_bits(fast(x), model(x))


def test_attributes_that_change_nothing_are_let_pass() -> None:
    fast, model, x = adapted()
    with torch.no_grad():
        for _ in range(3):  # `calls` counts on
            equal_bits(fast(x), model(x))


def test_a_model_in_another_dtype_afterwards_is_refused() -> None:
    fast, model, x = made()
    model.half()
    with pytest.raises(EecompileError, match="dtype"):
        fast(x)


class Plain(nn.Module):
    """[B, 8] -> [B, 4]: an activation without weights, and attributes that may change."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.act: Any = nn.ReLU()
        self.drop: Any = nn.Dropout()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(2))
        self.last = nn.Linear(8, 4)
        self.scale, self.clip, self.unused, self.width, self.both = 1.0, 1e3, 0, 8, False
        self.table: Any = None
        self.calls = 0

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        x = self.drop(self.act(x[:, : self.width] * self.scale)).clamp(-self.clip, self.clip)
        for block in self.blocks:
            x = block(x)
        return (self.last(x), x) if self.both else self.last(x)


@pytest.fixture(scope="module")
def of_plain() -> Any:
    return eecompile(Plain().eval(), strategies.Branchy(exits=1), example_inputs=(torch.randn(8, 8),))


@pytest.fixture
def plain(of_plain: Any) -> tuple[Any, Any, Tensor]:
    """A compiled module with its thresholds closed, its model, and inputs `[8, 8]` within +-1 but for the last row."""
    fast = copy.deepcopy(of_plain)
    fast.set_thresholds(CLOSED)
    x = torch.linspace(-1, 1, 64).reshape(8, 8)
    return fast, fast.original, torch.cat([x[:-1], 3 * x[-1:]])


REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a module without weights is replaced": (lambda m: setattr(m, "act", nn.Tanh()), "act"),
    "one in a container is replaced": (lambda m: m.blocks[1].__setitem__(1, nn.Tanh()), r"blocks\.1\.1"),
    "a block is appended": (lambda m: m.blocks.append(nn.Linear(8, 8)), r"blocks\.2"),
    "a module without weights is appended": (lambda m: m.blocks[1].append(nn.Tanh()), r"blocks\.1\.2"),
    "a module is removed": (lambda m: m.blocks.pop(1), r"blocks\.1"),
    "an attribute that counts in the last row alone": (lambda m: setattr(m, "clip", 2.0), "clip"),
    "another output": (lambda m: setattr(m, "both", True), "both[\\s\\S]*2 tensors"),
    "the model fails": (lambda m: setattr(m, "width", 4), "width[\\s\\S]*a model that fails"),
    "weight norm": (lambda m: parametrizations.weight_norm(m.blocks[0][0]), r"blocks\.0\.0"),
    "spectral norm": (lambda m: parametrizations.spectral_norm(m.last), "last"),
    "pruned": (lambda m: prune.l1_unstructured(m.blocks[0][0], "weight", 0.7), r"blocks\.0\.0\.weight"),
    "no bias": (lambda m: setattr(m.last, "bias", None), r"last\.bias"),
    "one layer is converted": (lambda m: m.last.double(), r"last\.weight[\s\S]*float64"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_is_another_one_is_refused(plain: tuple[Any, Any, Tensor], name: str) -> None:
    fast, model, x = plain
    equal_bits(fast(x), model(x))
    change, where = REFUSED[name]
    change(model)
    with pytest.raises(CaptureError, match=rf"has changed since it was compiled[\s\S]*{where}"):
        fast(x)


DOORS: dict[str, Callable[[Any, Any, Any], Any]] = {
    "save": lambda fast, data, path: fast.save(path),
    "pickle": lambda fast, data, path: pickle.dumps(fast),
    "export": lambda fast, data, path: fast.export(path / "net.pt2"),
    "verify_export": lambda fast, data, path: fast.verify_export(path / "net.pt2", data),
    "stage_inputs": lambda fast, data, path: fast.stage_inputs(data),
    "calibrate": lambda fast, data, path: fast.calibrate(data, max_drop=0.5),
    "calibrate to a budget": lambda fast, data, path: fast.calibrate(data, budget=0.9),
    "evaluate": lambda fast, data, path: fast.evaluate(data),
    "benchmark": lambda fast, data, path: fast.benchmark(data[0][0]),
    "fit": lambda fast, data, path: fast.fit(data, epochs=1, progress=False),
    "fit over kept features": lambda fast, data, path: fast.fit(data, epochs=1, cached=True, progress=False),
    "fit of the trunk": lambda fast, data, path: fast.fit(data, epochs=1, trunk=True, progress=False),
    "capture in train mode": lambda fast, data, path: fast.capture_training(),
    "other heads": lambda fast, data, path: fast.replace_heads({}),
    "device program": lambda fast, data, path: fast.device_program(),
    "device program of a call": lambda fast, data, path: fast.device_program(data[0][0]),
}


@pytest.mark.parametrize("name", DOORS)
def test_nothing_is_written_measured_or_trained_after_a_change(
    plain: tuple[Any, Any, Tensor], tmp_path: Path, name: str
) -> None:
    fast, model, x = plain
    model.scale = -3.0
    with pytest.raises(CaptureError, match=r"has changed since it was compiled[\s\S]*scale"):
        DOORS[name](fast, [(x, torch.arange(8) % 4)] * 2, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_a_converted_model_with_inputs_of_its_dtype_is_refused(plain: tuple[Any, Any, Tensor], dtype: torch.dtype) -> None:
    fast, model, x = plain
    model.to(dtype)
    with pytest.raises(CaptureError, match=r"has changed since it was compiled[\s\S]*dtype of capture"):
        fast(x.to(dtype))


UNINFORMATIVE: dict[str, Callable[[Tensor], Tensor]] = {
    "no row": lambda x: x[:0],
    "one row": lambda x: x[:1] * 0,
    "zeros": lambda x: x * 0,
    "a NaN": lambda x: torch.where(torch.arange(8) == 0, float("nan"), x),
}


@pytest.mark.parametrize("name", UNINFORMATIVE)
def test_calls_that_cannot_show_a_change_end_no_watch(plain: tuple[Any, Any, Tensor], name: str) -> None:
    fast, model, x = plain
    model.scale = 3.0
    for _ in range(4):
        fast(UNINFORMATIVE[name](x))
    with pytest.raises(CaptureError, match="scale"):
        fast(x)


def test_calls_of_one_row_end_a_watch_too(plain: tuple[Any, Any, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """Different rows, one a call, say as much as a batch of them; the same row again says nothing."""
    fast, model, x = plain
    model.unused = 1
    compared: list[int] = []
    usual = fast.entry.watch._compare
    monkeypatch.setattr(fast.entry.watch, "_compare", lambda *args: (compared.append(1), usual(*args)))
    for i in (0, 0, 0, 0, 1, 2, 3, 4, 5):
        equal_bits(fast(x[i : i + 1]), model(x[i : i + 1]))
    assert len(compared) == 7  # until three rows after the first were others than before


def test_a_change_that_few_calls_do_not_show_is_refused_later(plain: tuple[Any, Any, Tensor]) -> None:
    fast, model, x = plain
    model.clip = 2.0
    for _ in range(2):
        equal_bits(fast(0.5 * x), model(0.5 * x))
    with pytest.raises(CaptureError, match="clip"):
        fast(x)


ALIKE: dict[str, Callable[[Any], Any]] = {
    "nothing that is an array now": lambda m: setattr(m, "table", torch.arange(8).numpy()),
    "a number that is a tensor now": lambda m: setattr(m, "unused", torch.arange(3)),
    "a dropout that is removed": lambda m: setattr(m, "drop", nn.Identity()),
}


@pytest.mark.parametrize("name", ALIKE)
def test_what_is_equal_often_enough_is_followed(
    plain: tuple[Any, Any, Tensor], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    fast, model, x = plain
    ALIKE[name](model)
    for _ in range(4):  # `calls` is another one from the second on
        equal_bits(fast(x), model(x))
    monkeypatch.setattr(type(fast.entry.watch), "_compare", None)  # from here on nothing is compared
    equal_bits(fast(x), model(x))
    monkeypatch.undo()
    model.act = nn.Tanh()
    with pytest.raises(CaptureError, match="act"):
        fast(x)


OF_CASCADE: dict[str, tuple[Callable[[Any, Any], Any], str]] = {
    "the small model's attribute": (lambda small, large: setattr(small, "k", 2.0), r"small\.model\.k"),
    "the large model's attribute": (lambda small, large: setattr(large, "scale", 3.0), r"large\.model\.scale"),
    "a module": (lambda small, large: setattr(large, "act", nn.Tanh()), r"large\.model\.act"),
    "a hook": (lambda small, large: large.act.register_forward_hook(lambda _, given, out: 2 * out), "a hook"),
    "a dtype": (lambda small, large: large.last.double(), r"large\.model\.last\.weight"),
}


class Small(nn.Module):
    """[B, 8] -> [B, 4]."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.k = nn.Linear(8, 4), 1.0

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x) * self.k
        return y


@pytest.fixture(scope="module")
def of_cascade() -> Any:
    models = {"small": Small().eval(), "large": Plain().eval()}
    return eecompile(models, strategies.Cascade(), example_inputs=(torch.randn(8, 8),))


@pytest.mark.parametrize("name", OF_CASCADE)
def test_every_model_of_a_cascade_is_watched(of_cascade: Any, name: str) -> None:
    fast = copy.deepcopy(of_cascade)
    fast.set_thresholds(CLOSED)
    x = torch.linspace(-1, 1, 64).reshape(8, 8)
    models = fast.origin.captured
    small, large = models.small.model, models.large.model
    for _ in range(4):  # `calls` counts on
        equal_bits(fast(x), large(x))
    change, where = OF_CASCADE[name]
    change(small, large)
    with pytest.raises(CaptureError, match=rf"has changed since it was compiled[\s\S]*{where}"):
        fast(x)
