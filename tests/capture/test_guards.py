"""Branches on sizes: a call at any size equals the model, or is refused with the condition in words."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import Dim, export

from eecompile import CaptureError, EecompileError, eecompile, load, strategies
from eecompile.capture.export import capture_export
from eecompile.guards import Guard, load_guard, read_guard
from eecompile.signature import Signature
from tests.support import equal_bits


class Branching(nn.Module):
    """Tokens [B, S] (and [B, T]) to [B, 4]; each condition on their sizes scales the mean of the embeddings."""

    def __init__(self, conditions: tuple[str, ...], second: bool = False, depth: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conditions = [compile(c, c, "eval") for c in conditions]
        self.emb = nn.Embedding(50, 8)
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(depth)])
        self.out = nn.Linear(8, 4)
        if second:
            self.forward = self.two
        else:
            self.forward = self.one

    def one(self, ids: Tensor) -> Tensor:
        return self.rest(self.emb(ids).mean(1), ids, ids)

    def two(self, src: Tensor, tgt: Tensor) -> Tensor:
        return self.rest(self.emb(src).mean(1) - self.emb(tgt).mean(1), src, tgt)

    def rest(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        sizes = {"B": a.shape[0], "S": a.shape[1], "T": b.shape[1], "N": a.numel()}
        for i, condition in enumerate(self.conditions):
            if eval(condition, {}, sizes):
                x = x * (i + 2)
        for layer in self.layers:
            x = x + layer(x).relu()
        return self.out(x)


def tokens(*shape: int) -> Tensor:
    return torch.randint(0, 50, shape, generator=torch.Generator().manual_seed(sum(shape)))


def compiled(model: nn.Module, *example: Tensor, **options: Any) -> Any:
    fast = eecompile(model.eval(), strategies.Branchy(exits=1), example_inputs=example, **options)
    fast.set_thresholds(2.0)
    return fast


def equal_or_refused(fast: Any, model: nn.Module, *inputs: Tensor) -> bool:
    """Whether the call was answered; then as the model does."""
    try:
        with torch.no_grad():
            got = fast(*inputs)
    except CaptureError:
        return False
    with torch.no_grad():
        torch.testing.assert_close(got, model(*inputs), rtol=1e-5, atol=1e-6)
    return True


SIZES = [(1, 1), (1, 9), (2, 12), (3, 5), (4, 8), (5, 30), (7, 7), (16, 8), (40, 12)]


@pytest.mark.parametrize(
    ("condition", "answered"),
    [
        ("N > 100", "B * S <= 100"),
        ("B > S", "B <= S"),
        ("S % 4 == 0", "S % 4 == 0"),
        ("S > 10 and B < 20", "S > 10 and B < 20"),
        ("S == 9", "S != 9"),
        ("(B + S) % 2", "(B + S) % 2 == 0"),
        ("max(B, S) > 13", "max(B, S) <= 13"),
    ],
)
def test_a_branch_on_two_sizes_is_checked_at_every_call(condition, answered):
    model = Branching((condition,))
    fast = compiled(model, tokens(6, 12))
    for b, s in SIZES:
        expected = bool(eval(answered, {}, {"B": b, "S": s}))
        assert equal_or_refused(fast, model, tokens(b, s)) == expected, (b, s)
    assert equal_or_refused(fast, model, tokens(6, 12)), "a refusal is not kept"


@pytest.mark.parametrize("condition", ["T > S", "T * 2 > S", "S - T == 5"])
def test_two_lengths_compared_with_one_another(condition):
    model = Branching((condition,), second=True)
    fast = compiled(model, tokens(4, 12), tokens(4, 7))
    for s, t in ((12, 7), (7, 12), (9, 9), (3, 20), (14, 9)):
        sizes = {"S": s, "T": t}
        same = eval(condition, {}, sizes) == eval(condition, {}, {"S": 12, "T": 7})
        assert equal_or_refused(fast, model, tokens(3, s), tokens(3, t)) == same, sizes


class Products(nn.Module):
    """Attention by `einsum`, which takes another way for sizes of 1; `branch` is one of the model's own code."""

    def __init__(self, branch: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.branch = branch
        self.emb, self.out = nn.Embedding(50, 8), nn.Linear(8, 4)
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])

    def forward(self, ids: Tensor) -> Tensor:
        x = self.emb(ids).transpose(0, 1)
        for layer in self.layers:
            scores = torch.einsum("ibd,jbd->bij", layer(x), x).softmax(2)
            x = x + torch.einsum("bij,jbd->ibd", scores, x)
        if self.branch and ids.shape[1] == 1:
            x = x * 1.5
        return self.out(x.mean(0))


@pytest.mark.parametrize("branch", [False, True])
def test_sizes_of_one_are_answered_where_only_operators_ask_for_them(branch):
    model = Products(branch).eval()
    fast = compiled(model, tokens(6, 9))
    for b, s in ((1, 9), (1, 1), (5, 1), (1, 30), (3, 4)):
        answered = equal_or_refused(fast, model, tokens(b, s))
        assert answered == (not branch or s > 1), (b, s)


def test_the_refusal_names_line_sizes_and_condition():
    fast = compiled(Branching(("N > 100",)), tokens(6, 12))
    for call in (fast, fast.run, fast.observe, fast.full):
        with pytest.raises(CaptureError) as caught:
            call(tokens(16, 8))
        text = str(caught.value)
        assert "test_guards.py" in text
        assert "if eval(condition, {}, sizes):" in text
        assert "got:    batch 16, seq 8 (ids: [16, 8])" in text
        assert "wanted: seq * batch <= 100" in text
        assert "batch is ids.shape[0]" in text


@pytest.mark.parametrize("trunk", [False, True])
def test_guards_hold_in_train_mode_and_after_loading(tmp_path, trunk):
    model = Branching(("N > 100", "B > 50"))
    fast = eecompile(model.eval(), strategies.Branchy(exits=1, trunk=trunk), example_inputs=(tokens(4, 12),))
    fast.save(tmp_path / "saved")
    for one in (fast, load(tmp_path / "saved")):
        one.set_thresholds(2.0)
        for training in (False, True):
            one.train(training)
            one.run(tokens(3, 12))
            with pytest.raises(CaptureError, match="another branch"):
                one.run(tokens(9, 12))


def test_a_branch_of_train_mode_only_is_checked_in_train_mode(tmp_path):
    class Trained(Branching):
        def rest(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
            return super().rest(2 * x if self.training and a.numel() > 100 else x, a, b)

    model = Trained(()).eval()
    fast = eecompile(model, strategies.Branchy(exits=1, trunk=True), example_inputs=(tokens(4, 12),))
    fast.save(tmp_path / "saved")
    for one in (fast, load(tmp_path / "saved")):
        one.set_thresholds(2.0)
        with torch.no_grad():
            torch.testing.assert_close(one(tokens(16, 12)), model(tokens(16, 12)), rtol=1e-5, atol=1e-6)
        one.train()
        with pytest.raises(CaptureError, match="another branch"):
            one.run(tokens(16, 12))


def test_guards_of_a_cascade():
    small, large = Branching(()), Branching(("N > 100",), depth=12)
    fast = eecompile({"small": small.eval(), "large": large.eval()}, "cascade", example_inputs=(tokens(4, 12),))
    fast.set_thresholds(2.0)
    assert equal_or_refused(fast, large, tokens(5, 12))
    assert not equal_or_refused(fast, large, tokens(16, 12))


@pytest.mark.parametrize("from_file", [False, True])
def test_guards_of_a_users_own_program(tmp_path, from_file):
    model = Branching(("N > 100",)).eval()
    dims = ({0: Dim("rows", min=1, max=512), 1: Dim("length", min=2, max=64)},)
    program: Any = export(model, (tokens(4, 12),), dynamic_shapes=dims, strict=False)
    if from_file:
        torch.export.save(program, tmp_path / "model.pt2")
        program = tmp_path / "model.pt2"
    fast = compiled_program(program)
    assert equal_or_refused(fast, model, tokens(5, 12))
    assert not equal_or_refused(fast, model, tokens(16, 12))


def compiled_program(program: Any) -> Any:
    fast = eecompile(program, strategies.Branchy(exits=1), example_inputs=(tokens(4, 12),))
    fast.set_thresholds(2.0)
    return fast


def test_height_against_width():
    class Image(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.stem = nn.Conv2d(3, 8, 3, padding=1)
            self.blocks = nn.ModuleList([nn.Conv2d(8, 8, 3, padding=1) for _ in range(3)])
            self.out = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x.transpose(2, 3) if x.shape[2] > x.shape[3] else x)
            for block in self.blocks:
                x = x + block(x).relu()
            return self.out(x.mean((2, 3)))

    model = Image().eval()
    fast = compiled(model, torch.randn(4, 3, 8, 12), dynamic={"x": {2: "height", 3: "width"}})
    answered = [equal_or_refused(fast, model, torch.randn(2, 3, h, w)) for h, w in ((8, 12), (6, 20), (9, 9), (12, 8))]
    assert answered == [True, True, True, False]
    with pytest.raises(CaptureError, match=r"height <= width, where height is x.shape\[2\]"):
        fast(torch.randn(2, 3, 12, 8))


def condition(*sizes: str) -> st.SearchStrategy[str]:
    """Conditions over sizes, as text."""
    small = st.sampled_from(["1", "2", "4", "7", "12", "30", "60"])
    one = st.sampled_from(sizes)
    product = st.tuples(st.sampled_from(["2", "3", *sizes]), st.just("*"), one).map(" ".join)
    rest = st.tuples(one, st.sampled_from(["//", "%", "+", "-"]), st.sampled_from(["2", "3", *sizes])).map(" ".join)
    number = st.one_of(one, product, rest.map("({})".format))
    atom = st.tuples(number, st.sampled_from(["<", "<=", ">", ">=", "==", "!="]), st.one_of(small, number)).map(" ".join)
    pair = st.tuples(atom, st.sampled_from(["and", "or"]), atom).map(" ".join)
    return st.one_of(atom, pair, atom.map("not {}".format))


ONE = st.lists(condition("B", "S"), min_size=1, max_size=3).map(tuple)
TWO = st.lists(condition("B", "S", "T"), min_size=1, max_size=3).map(tuple)
CALLS = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 14), st.integers(1, 14)), min_size=6, max_size=20)


def check_capture(second: bool, conditions: tuple[str, ...], calls: list[tuple[int, int, int]]) -> None:
    """The capture alone, without exits: where its signature admits a call, its graph is the model."""
    model = Branching(conditions, second, depth=0).eval()

    def inputs(b: int, s: int, t: int) -> tuple[Tensor, ...]:
        return (tokens(b, s), tokens(b, t)) if second else (tokens(b, s),)

    example = inputs(5, 8, 6)
    try:
        captured = capture_export(model, example, {})
    except EecompileError:  # one number of rows only, or a row by itself takes another branch
        return
    assert captured.signature.admits(example)
    for call in calls:
        given = inputs(*call)
        try:
            want = model(*given)
        except ZeroDivisionError:
            continue
        if captured.signature.admits(given):
            with torch.no_grad():
                torch.testing.assert_close(captured.graph_module(*given)[0], want, rtol=1e-5, atol=1e-6)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(st.one_of(st.tuples(st.just(False), ONE), st.tuples(st.just(True), TWO)), CALLS)
@example((False, ("S < B or 2 * S < 4",)), [(1, 1, 1)])  # a branch that is taken where both sizes are 1
def test_random_branches_at_random_sizes_equal_the_model_or_are_refused(model, calls):
    check_capture(*model, calls)


@pytest.mark.nightly
@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.one_of(st.tuples(st.just(False), ONE), st.tuples(st.just(True), TWO)), CALLS)
def test_many_random_branches_equal_the_model_or_are_refused(model, calls):
    check_capture(*model, calls)


@pytest.mark.nightly
@settings(max_examples=20, deadline=None, derandomize=True, phases=[Phase.generate])
@given(ONE, CALLS)
def test_compiled_models_with_random_branches_equal_the_model_or_refuse(conditions, calls):
    model = Branching(conditions).eval()
    try:
        fast = compiled(model, tokens(5, 8))
    except (EecompileError, ZeroDivisionError):
        return
    for b, s, _ in [(5, 8, 0), *calls]:
        equal_or_refused(fast, model, tokens(b, s))
    assert equal_or_refused(fast, model, tokens(5, 8))


# ------------------------------------------------------------------------------------------------ expressions

AT = {"ids": ("batch", "seq"), "x": ("batch", 16)}


@pytest.mark.parametrize(
    ("code", "words", "bound"),
    [
        ("L['ids'].size()[0]*L['ids'].size()[1] <= 100", "batch * seq <= 100", None),
        ("L['ids'].size()[1] > 6", "seq > 6", ("seq", 7, None)),
        ("9 >= L['ids'].size()[1]", "9 >= seq", ("seq", None, 9)),
        ("not (L['ids'].size()[0] < L['ids'].size()[1])", "batch >= seq", None),
        ("(L['ids'].size()[1] % 4) == 0", "(seq % 4) == 0", None),
        ("1 < L['ids'].size()[0] and L['ids'].size()[0] < 9", "(1 < batch) and (batch < 9)", None),
        ("max(L['ids'].size()[0], math.floor(L['ids'].size()[1]/2)) < 5", "max(batch, floor(seq / 2)) < 5", None),
        ("L['x'].size()[1] + L['ids'].size()[0] != 20", "(16 + batch) != 20", None),
    ],
)
def test_conditions_are_read_said_and_saved(code, words, bound):
    guard = read_guard(code, lambda name, axis: AT[name][axis], "net.py:3")
    assert guard is not None
    assert (str(guard), guard.bound, guard.where) == (words, bound, "net.py:3")
    again = load_guard(json.loads(json.dumps(guard.to_json())))
    assert again == guard
    for batch in range(12):
        for seq in range(1, 12):
            size = {"ids": (batch, seq), "x": (batch, 16)}
            text = code
            for name, (a, b) in size.items():
                text = text.replace(f"L['{name}'].size()[0]", str(a)).replace(f"L['{name}'].size()[1]", str(b))
            assert guard.holds({"batch": batch, "seq": seq}) == eval(text, {"math": __import__("math")})


def test_a_condition_that_always_holds_is_none():
    assert read_guard("L['ids'].size()[0] == L['x'].size()[0]", lambda name, axis: AT[name][axis]) is None
    assert read_guard("L['x'].size()[1] > 3", lambda name, axis: AT[name][axis]) is None


@pytest.mark.parametrize(
    "code", ["__import__('os').getcwd()", "f(L['ids'].size()[0])", "L['ids'].stride()[0] == 1", "'a' == 'b'"]
)
def test_a_condition_in_another_form_is_refused_and_never_run(code):
    with pytest.raises(CaptureError, match="cannot be checked at a call"):
        read_guard(code, lambda name, axis: AT[name][axis])


def test_a_saved_condition_with_an_unknown_operator_is_refused():
    with pytest.raises(ValueError, match="unknown operator"):
        load_guard([["system", 1], ""])


def test_a_number_of_rows_divided_by_zero_is_not_admitted():
    assert not Guard(("==", ("%", "seq", "batch"), 0)).holds({"seq": 4, "batch": 0})


def test_a_call_at_a_known_shape_checks_nothing(monkeypatch):
    fast = compiled(Branching(("N > 100",)), tokens(6, 12))
    fast(tokens(6, 12))
    monkeypatch.setattr(Signature, "_check", None)
    fast(tokens(6, 12))
    equal_bits(fast(tokens(6, 12)), fast.full(tokens(6, 12)))
