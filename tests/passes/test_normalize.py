"""`normalize`: what is rewritten, what is left and why, and that no number changes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eecompile.capture.export import capture_export
from eecompile.passes import Normalize, facts, run_passes
from eecompile.program import Program
from tests.passes.conftest import Source, built, code, noise, same_bits, source, targets

aten = torch.ops.aten


class Shapes(nn.Module):
    """A view with -1, a squeeze without axes, dropout: all of what runs into trouble on fewer rows."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 3)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop(self.a(x)).view(x.shape[0], -1, 4)
        h = h.unsqueeze(1).squeeze()
        return self.b(h.reshape(x.shape[0], 8))


class Attention(nn.Module):
    """One head over [B, S, 8]; `mask` makes its attention mask from the values."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.qkv, self.out = kind, nn.Linear(8, 24), nn.Linear(8, 3)

    def mask(self, x: Tensor) -> Tensor:
        square = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool)
        if self.kind == "all":
            return square
        if self.kind == "causal":
            return square.tril()
        if self.kind == "window":
            return square.tril(1)
        return (x[:, :, 0] > -9)[:, None, :].expand(-1, x.shape[1], -1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask(x)).mean(1))


def normalized(s: Source) -> Program:
    return run_passes(s.program(), [Normalize()])


def attention(kind: str) -> Source:
    return source(built(lambda: Attention(kind)), (noise(4, 5, 8),))


def check_numbers(s: Source, program: Program) -> None:
    for rows in (1, 2, 5):
        flat = s.inputs(rows)
        with torch.no_grad():
            same_bits(program.graph_module(*flat), s.captured.graph_module(*flat))


def test_views_squeezes_and_dropout() -> None:
    s = source(built(Shapes), (noise(4, 8),))
    before = code(s.captured.graph_module)
    assert "-1" in before
    assert "aten.squeeze.default" in before
    assert "dropout" in before
    program = normalized(s)
    after = code(program.graph_module)
    assert "-1" not in after
    assert "aten.squeeze.default" not in after
    assert "dropout" not in after
    squeeze = next(n for n in program.graph_module.graph.nodes if n.target is aten.squeeze.dims)
    assert squeeze.args[1] == [1]  # never the batch
    assert program.history["normalize"].modified
    assert program.history["normalize"].summary == "2 views, 1 no-ops"
    check_numbers(s, program)
    assert code(s.captured.graph_module) == before


def test_it_is_idempotent() -> None:
    for s in (source(built(Shapes), (noise(4, 8),)), attention("causal")):
        once = normalized(s)
        twice = run_passes(once, [Normalize()])
        assert code(twice.graph_module) == code(once.graph_module)
        assert not twice.history[-1].modified
        assert twice.graph_module is not once.graph_module


def test_nothing_to_do_says_so(lenet: Source) -> None:
    program = run_passes(normalized(lenet), [Normalize()])
    assert not program.history[-1].modified
    assert program.history[-1].summary == ""


def sdpa(program: Program) -> tuple[object, bool]:
    """Mask and causal flag of the attention."""
    n = next(n for n in program.graph_module.graph.nodes if n.target is aten.scaled_dot_product_attention.default)
    mask = n.args[3] if len(n.args) > 3 else n.kwargs.get("attn_mask")
    return mask, bool(n.args[5] if len(n.args) > 5 else n.kwargs.get("is_causal", False))


def test_a_mask_that_hides_nothing_goes_away() -> None:
    s = attention("all")
    program = normalized(s)
    assert sdpa(program) == (None, False)
    assert "1 masks" in program.history["normalize"].summary
    assert not any("ones" in t for t in targets(program.graph_module))
    check_numbers(s, program)


def test_a_causal_mask_becomes_a_flag() -> None:
    s = attention("causal")
    program = normalized(s)
    assert sdpa(program) == (None, True)
    flat = s.inputs(3)
    with torch.no_grad():  # another kernel may run: equal in value
        torch.testing.assert_close(program.graph_module(*flat), s.captured.graph_module(*flat), rtol=1e-6, atol=1e-6)


def test_a_mask_of_another_form_or_of_the_data_stays() -> None:
    for kind in ("window", "data"):
        s = attention(kind)
        program = normalized(s)
        assert sdpa(program)[0] is not None, kind
        check_numbers(s, program)


def test_dropout_that_is_on_stays() -> None:
    model = built(Shapes)
    train = capture_export(model, (noise(4, 8),), {}, training=True)
    program = run_passes(Program(train.graph_module, train.graph_module, train.signature), [Normalize()])
    assert any("dropout" in t for t in targets(program.graph_module))
    assert not model.training


def test_a_size_that_is_free_stays_open() -> None:
    """-1 stands for the sequence here: there is no number to write."""

    class Free(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.out = nn.Embedding(20, 8), nn.Linear(8, 3)

        def forward(self, ids: Tensor) -> Tensor:
            h = self.embed(ids)
            return self.out(h.view(ids.shape[0], -1, 2, 4).flatten(2).mean(1))

    s = source(built(Free), (torch.randint(0, 20, (4, 6)),))
    program = normalized(s)
    assert "seq" in program.signature.dynamic
    for rows, length in ((1, 6), (3, 4)):
        flat = [torch.randint(0, 20, (rows, length))]
        same_bits(program.graph_module(*flat), s.captured.graph_module(*flat))
    assert facts.placeholders(program.graph_module)[0].name == "ids"


class Wasteful(nn.Module):
    """A branch that nothing reads, which an in-place operator ends; and writes that are read."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.unread, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        self.unread(h).relu_()
        h[:, :4].mul_(2.0)
        h.view(-1, 2, 4)[:, 0].add_(1.0)
        return self.out(h)


def test_work_that_no_output_needs_goes_away_and_writes_that_are_read_stay() -> None:
    s = source(built(Wasteful), (noise(4, 8),))
    program = normalized(s)
    before, after = code(s.captured.graph_module), code(program.graph_module)
    assert "unread_weight" in before
    assert "unread_weight" not in after
    assert "relu_" not in after
    for kept in ("slice", "mul_", "add_"):
        assert after.count(kept) == before.count(kept), kept
    assert "dead nodes" in program.history["normalize"].summary
    check_numbers(s, program)


class Early(nn.Module):
    """Weights that are computed at the start: one for the end, one that is read twice, one that is written to first."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(noise(8, 8)), nn.Parameter(noise(3, 8))

    def forward(self, x: Tensor) -> Tensor:
        last, both = (self.b * 0.5).relu(), self.a.tanh()
        own = self.a.clone()
        before = own + 1
        own.mul_(2)
        h = F.linear(F.linear(x, both).relu(), both)
        return F.linear(F.linear(h, own) + F.linear(h, before), last)


def test_values_of_weights_come_before_their_first_reader() -> None:
    s = source(built(Early), (noise(4, 8),))
    program = normalized(s)
    order = list(program.graph_module.graph.nodes)
    place = {name: next(i for i, n in enumerate(order) if n.name == name) for name in ("relu", "tanh", "add", "mul_")}
    readers = [i for i, n in enumerate(order) if n.target is aten.linear.default]
    assert place["tanh"] < readers[0], "both of its readers come later"
    assert readers[1] < place["relu"] < readers[-1]
    assert place["add"] < place["mul_"], "it is what stood there before the write"
    check_numbers(s, program)
    assert not run_passes(program, [Normalize()]).history[-1].modified
