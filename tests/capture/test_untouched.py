"""The user's model stays as it was: parameters, hooks, mode, attributes; and what is moved is the graph's own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eecompile import CaptureError, CompiledModule
from eecompile.capture.export import capture_export
from eecompile.passes.facts import copy as copied
from eecompile.runtime.devices import move_constants
from tests.capture.nets import CLASSES, WIDTH, Block, Net, compiled, made, rows
from tests.support import Fingerprint, close, equal_bits, shares_parameters
from tests.support import compiled as eecompile
from tests.zoo_plain import VOCABULARY, Encoder


class Tied(Net):
    """Two blocks are one, and the last layer is tied to a table."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[2] = self.blocks[1]
        self.table = nn.Embedding(CLASSES, WIDTH)
        self.out.weight = self.table.weight


class Constants(Net):
    def forward(self, x: Tensor) -> Tensor:
        shift = torch.zeros(x.shape[0], WIDTH, device=x.device) + torch.arange(WIDTH, device="cpu")
        return super().forward(x + shift.to(x.device))


class DropPath(Net):
    """Whole blocks are left out in train mode: no flag in the graph could switch that."""

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if self.training:
                keep = (torch.rand(x.shape[0], 1) > 0.5).to(x.dtype)
                x = x + keep * (block(x) - x)
            else:
                x = block(x)
        return self.out(x)


@pytest.mark.parametrize("capture", ["export", "blocks"])
def test_nothing_of_the_model_changes(capture):
    model = made(Tied).train()
    model.blocks[3].eval()
    model.out.bias.requires_grad_(False)
    model.label = "mine"
    before, names = Fingerprint.of(model), set(model.__dict__)
    fast = compiled(model, rows(4), capture=capture)
    with torch.no_grad():
        fast(rows(3))
        fast.run(rows(3))
    before.check(model)
    assert (model.label, set(model.__dict__)) == ("mine", names)
    assert model.training
    assert not model.blocks[3].training
    if capture == "export":
        shares_parameters(fast, model)


def test_a_model_that_fails_to_be_captured_is_as_it_was():
    class OnData(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if x.sum() > 0 else -x)

    model = made(OnData).train()
    before = Fingerprint.of(model)
    with pytest.raises(CaptureError):
        eecompile(model, example_inputs=(rows(4),))
    before.check(model)
    assert model.training
    assert torch.backends.mha.get_fastpath_enabled()


def test_weights_that_change_later_are_seen_by_both():
    model = made(Net)
    fast = compiled(model, rows(4))
    with torch.no_grad():
        model.out.bias.add_(1.0)
        equal_bits(fast(rows(3)), model(rows(3)))
    state = {k: v + 0.1 for k, v in model.state_dict().items()}
    model.load_state_dict(state)
    with torch.no_grad():
        equal_bits(fast(rows(3)), model(rows(3)))


@pytest.mark.parametrize(("capture", "calls"), [("export", 0), ("blocks", 1)])
def test_hooks_are_kept_and_count_once(capture, calls):
    """A trace runs hooks once and keeps what they did; the fallback runs the model, hooks and all, once for each call."""
    model = made(Net)
    counted: list[int] = []

    def doubled(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        counted.append(1)
        return 2 * output

    def shifted(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        return (args[0] + 1,)

    model.blocks[1].register_forward_hook(doubled)
    model.blocks[2].register_forward_pre_hook(shifted)
    before = Fingerprint.of(model)
    fast = compiled(model, rows(4), capture=capture)
    before.check(model)
    assert len(model.blocks[1]._forward_hooks) == len(model.blocks[2]._forward_pre_hooks) == 1
    x = rows(3)
    with torch.no_grad():
        want = model(x)
        counted.clear()
        got = fast(x)
    equal_bits(got, want)
    assert len(counted) == calls


class Padded(Encoder):
    """Reads what stands at padded positions, which the fused path sets to zero."""

    def __init__(self, nested: bool = True) -> None:
        super().__init__()
        self.enc.enable_nested_tensor = self.enc.use_nested_tensor = nested


def tokens(padding: bool) -> Tensor:
    found = torch.randint(1, VOCABULARY, (4, 12), generator=torch.Generator().manual_seed(0))
    if padding:
        found[1, 8:] = 0
    return found


@pytest.fixture
def fused() -> Iterator[None]:
    yield
    torch.backends.mha.set_fastpath_enabled(True)


def test_the_fast_path_of_attention_is_off_while_it_is_traced_and_as_it_was_afterwards(fused):
    torch.manual_seed(0)
    model = Encoder().eval()
    seen: list[bool] = []
    model.emb.register_forward_hook(lambda *_: seen.append(torch.backends.mha.get_fastpath_enabled()))
    fast = compiled(model, tokens(padding=False))
    assert seen[0] is False
    assert seen[-1] is True, "the numbers are compared with the path that the user has, too"
    assert torch.backends.mha.get_fastpath_enabled()
    with torch.no_grad():
        close(fast(tokens(padding=False)[:3]), model(tokens(padding=False)[:3]), 1e-6)
    torch.backends.mha.set_fastpath_enabled(False)
    compiled(model, tokens(padding=False))
    assert not torch.backends.mha.get_fastpath_enabled(), "what the user had set comes back"


def test_a_fast_path_with_other_numbers_is_refused_with_the_way_round(fused):
    torch.manual_seed(0)
    model, x = Padded().eval(), tokens(padding=True)
    with pytest.raises(CaptureError) as caught:
        eecompile(model, example_inputs=(x,))
    text = str(caught.value)
    assert "other numbers through torch's fused attention" in text
    assert "enable_nested_tensor=False" in text
    assert torch.backends.mha.get_fastpath_enabled()
    other = Padded(nested=False).eval()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        close(compiled(other, x)(x[:3]), other(x[:3]), 1e-6)
    torch.backends.mha.set_fastpath_enabled(False)
    with torch.no_grad():
        close(compiled(model, x)(x[:3]), model(x[:3]), 1e-6)


def test_two_captures_of_one_model_share_parameters_and_block_names():
    model = made(DropPath)
    fast = compiled(model, rows(4))
    train = capture_export(model, (rows(4),), {}, training=True)
    own = {id(p) for p in model.parameters()}
    assert {id(p) for p in train.graph_module.parameters()} == own
    assert {id(p) for p in fast.program.source.parameters()} == own
    random = [n for n in train.graph_module.graph.nodes if "rand" in str(n.target)]
    assert len(random) == 4
    assert not [n for n in fast.source_graph.graph.nodes if "rand" in str(n.target)]
    fast.train_trunk = True
    fast.train()
    torch.manual_seed(1)
    first = fast.run(rows(6)).outputs
    second = fast.run(rows(6)).outputs
    assert len(first) == len(fast.exits) + 1
    assert not torch.equal(first[-1], second[-1]), "blocks are left out at random"
    first[0].sum().backward()
    assert model.blocks[0].up.weight.grad is not None
    assert model.blocks[3].up.weight.grad is None


def test_the_exported_program_keeps_its_own_graph_and_metadata():
    fast = compiled(made(Net), rows(4))
    again = capture_export(made(Net), (rows(4),), {})
    ours, fresh = fast.origin.exported, again.exported
    assert str(ours.graph) == str(fresh.graph)
    metas = [[sorted(n.meta) for n in e.graph.nodes] for e in (ours, fresh)]
    assert metas[0] == metas[1]


def devices(fast: CompiledModule) -> set[torch.device]:
    return {
        a
        for n in fast.source_graph.graph.nodes
        for a in torch.utils._pytree.tree_leaves((n.args, n.kwargs))
        if isinstance(a, torch.device)
    }


def test_devices_that_were_burned_in_move():
    model = made(Constants)
    fast = compiled(model, rows(4))
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    assert devices(fast) == {cpu}
    graph = copied(fast.source_graph)
    count = move_constants(graph, cuda)
    assert count >= 2
    text = graph.code
    assert "cuda" in text
    assert "device = device(type='cpu')" not in text
    assert devices(fast) == {cpu}, "a copy moved, not the original"
    assert move_constants(graph, cpu) == count
    with torch.no_grad():
        equal_bits(graph(rows(3))[0], model(rows(3)))
        equal_bits(fast.to("cpu")(rows(3)), model(rows(3)))


def test_another_dtype_is_refused_and_changes_nothing():
    model = made(Net)
    fast = compiled(model, rows(4))
    for move in (lambda: fast.half(), lambda: fast.to(torch.float64), lambda: fast.double()):
        with pytest.raises(Exception, match="keeps the dtype that it was captured in") as caught:
            move()
        assert "convert the model first" in str(caught.value)
    assert {p.dtype for p in fast.parameters()} == {torch.float32}
    with torch.no_grad():
        equal_bits(fast(rows(3)), model(rows(3)))


def test_a_model_in_another_dtype_is_captured_in_it():
    model = made(Net).double()
    fast = compiled(model, rows(4).double())
    with torch.no_grad():
        equal_bits(fast(rows(3).double()), model(rows(3).double()))
    assert {p.dtype for p in fast.head_parameters()} == {torch.float64}
    assert isinstance(model.blocks[0], Block)
