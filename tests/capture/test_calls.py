"""The call: positional, by name, with `*args` and `**kwargs`, with None and burned-in values; other calls are refused."""

from __future__ import annotations

from collections import OrderedDict, UserDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eecompile import CaptureError, CompiledModule, load
from tests.capture.nets import CLASSES, WIDTH, Net, compiled, made, rows
from tests.support import compiled as eecompile
from tests.support import equal_bits


class Options(Net):
    def forward(self, x: Tensor, *, scale: Tensor, mask: Tensor | None = None, twice: bool = False) -> Tensor:
        x = x * scale
        if mask is not None:
            x = x * mask
        return super().forward(2 * x if twice else x)


class Open(Net):
    """Everything lands in `*args` and `**kwargs`, which torch.export cannot give dynamic shapes."""

    def forward(self, x: Tensor, *parts: Tensor, **named: Tensor) -> Tensor:
        for part in parts:
            x = x + part
        return super().forward(x * named["scale"])


class Nested(Net):
    def forward(self, views: dict[str, Tensor], pair: tuple[Tensor, Tensor]) -> Tensor:
        return super().forward(views["left"] + views["right"] * pair[0] + pair[1])


@pytest.fixture(scope="module")
def options() -> tuple[Options, CompiledModule]:
    model = made(Options)
    return model, compiled(model, rows(4), example_kwargs={"scale": rows(4, 1), "mask": None, "twice": True})


def test_names_positions_and_none(options):
    model, fast = options
    x, scale = rows(3), rows(3, 1)
    with torch.no_grad():
        want = model(x, scale=scale, twice=True)
        for args, kwargs in (
            ((x,), {"scale": scale, "twice": True}),
            ((x,), {"scale": scale}),  # burned in, so it need not be said again
            ((), {"scale": scale, "x": x, "mask": None}),
        ):
            equal_bits(fast(*args, **kwargs), want)


@pytest.mark.parametrize(
    ("args", "kwargs", "said"),
    [
        (
            (rows(3),),
            {},
            ["other arguments than the model was captured with", "x: Tensor[3, 16]", "scale: float32["],
        ),
        ((), {}, ["other arguments", "x: float32[batch, 16]"]),
        ((rows(3),), {"scale": rows(3, 1), "mask": rows(3)}, ["other arguments", "mask: Tensor[3, 16]", "compile again"]),
        ((rows(3), rows(3, 1)), {}, ["too many positional arguments", "at most 1: x"]),
        ((rows(3),), {"scale": rows(3, 1), "x": rows(3)}, ["given twice", "where:  x"]),
        ((rows(3),), {"scael": rows(3, 1)}, ["no such argument", "did you mean scale"]),
        ((rows(3),), {"scale": rows(3, 1), "twice": False}, ["differs from the value that was captured", "got:    False"]),
        ((rows(3).tolist(),), {"scale": rows(3, 1)}, ["other arguments", "x: list"]),
        ((rows(3).double(),), {"scale": rows(3, 1)}, ["where:  x", "float64[3, 16]", "x: float32[batch, 16]", "convert"]),
        ((rows(3, 4),), {"scale": rows(3, 1)}, ["where:  x", "float32[3, 4]", "x: float32[batch, 16]"]),
        ((rows(3)[0],), {"scale": rows(3, 1)}, ["where:  x", "float32[16]"]),
    ],
)
def test_other_calls_say_what_was_captured(options, args, kwargs, said):
    for call in (options[1], options[1].run, options[1].observe, options[1].full):
        with pytest.raises(CaptureError) as caught:
            call(*args, **kwargs)
        for text in said:
            assert text in str(caught.value)


def test_an_input_on_another_device_is_named(options):
    with pytest.raises(CaptureError) as caught:
        options[1](rows(3).to("meta"), scale=rows(3, 1))
    text = str(caught.value)
    assert "an input is on another device than the program" in text
    assert "where:  x" in text
    assert "got:    meta" in text
    assert "wanted: cpu" in text
    assert '.to("cpu")' in text


def test_an_error_within_the_program_stays_what_it_is(options, monkeypatch):
    def broken(*_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(options[1].engine.chosen, "run", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        options[1](rows(3), scale=rows(3, 1))


def test_open_arguments():
    model = made(Open)
    fast = compiled(model, rows(4), rows(4, seed=2), rows(4, seed=3), example_kwargs={"scale": rows(4, 1)})
    for count in (1, 5):
        args = [rows(count, seed=s) for s in (4, 5, 6)]
        with torch.no_grad():
            equal_bits(fast(*args, scale=rows(count, 1)), model(*args, scale=rows(count, 1)))
    with pytest.raises(CaptureError, match="other arguments"):
        fast(rows(4), rows(4), scale=rows(4, 1))
    with pytest.raises(CaptureError, match="other arguments"):
        fast(rows(4), rows(4), rows(4), scale=rows(4, 1), shift=rows(4, 1))


class Optional(Net):
    def forward(self, x: Tensor, mask: Tensor | None = None, scale: float | None = 2.0) -> Tensor:
        x = x + self.shift if mask is None else x * mask
        return super().forward(x if scale is None else scale * x)

    shift = 0.0


@pytest.mark.parametrize("way", ["export", "blocks", "cascade"])
@pytest.mark.parametrize(("args", "kwargs"), [((rows(6), rows(6)), {}), ((), {"x": rows(6), "mask": rows(6)})])
def test_the_model_is_called_as_in_the_example(args, kwargs, way):
    """Wherever it is called, so that its hooks find what they read."""
    model, given = made(Optional), []
    model.register_forward_pre_hook(lambda m, a, k: given.append((len(a), *sorted(k))), with_kwargs=True)
    first = {"cascade": [Optional(1).eval(), model]}.get(way, model)
    options = {"strategy": "cascade"} if way == "cascade" else {"capture": way}
    fast = compiled(first, *args, example_kwargs=kwargs, closed=False, **options)
    data = [(args or kwargs, torch.arange(6) % CLASSES)]
    if way != "cascade":
        fast.fit(data, epochs=1, trunk=True, progress=False)
    fast.evaluate(data)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        fast(*args, **kwargs)
    fast.running.shift = -0.0  # a change, so that graph and model are compared
    fast(*args, **kwargs)
    assert given
    assert set(given) == {(len(args), *sorted(kwargs))}


class Features(Net):
    def forward(self, **features: Tensor) -> Tensor:
        return super().forward(torch.cat(list(features.values()), 1))


@pytest.mark.parametrize("capture", ["export", "blocks"])
def test_named_arguments_keep_their_order(capture):
    model, given = made(Features), {"z": rows(4, 10), "a": rows(4, 6)}
    fast = compiled(model, example_kwargs=given, capture=capture)
    with torch.no_grad():
        equal_bits(fast(**given), model(**given))
        with pytest.raises(CaptureError, match="another order"):
            fast(a=given["a"], z=given["z"])


class Entries(Net):
    """Reads the entries of a mapping by their names, or one after the other."""

    def __init__(self, by_name: bool) -> None:
        super().__init__()
        self.by_name = by_name

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        first, second = (batch["a"], batch["b"]) if self.by_name else batch.values()
        return super().forward(first - 2 * second)


def test_entries_of_mappings_come_in_any_order_where_the_model_does_not_see_it(tmp_path):
    given = {"a": rows(4), "b": rows(4, seed=2)}
    turned = dict(reversed(given.items()))
    model = made(lambda: Entries(True))
    with torch.no_grad():
        equal_bits(compiled(model, given)(turned), model(turned))
    fast = compiled(made(lambda: Entries(False)), given)
    fast.save(tmp_path / "program")
    for each in (fast, load(tmp_path / "program")):
        equal_bits(each(given), fast.running(given))
        with pytest.raises(CaptureError, match="another order"):
            each(turned)


def test_none_before_another_argument_and_in_the_place_of_another_default():
    model, x = made(Optional), rows(4)
    with torch.no_grad():
        equal_bits(compiled(model, x, None, 3.0)(x, None, 3.0), model(x, None, 3.0))
        fast = compiled(model, x, example_kwargs={"scale": None})
        equal_bits(fast(x, scale=None), model(x, scale=None))
        with pytest.raises(CaptureError, match="other arguments"):
            compiled(model, x)(x, scale=None)


class Given(Net):
    """What None means is its own: it is asked for, has a default that is no number, or stands among further arguments."""

    def forward(self, x: Tensor, mask: Tensor | None, scale: Any = (2.0,), *rest: Any, **more: Any) -> Tensor:
        x = x if mask is None else x * mask
        x = 3 * x if scale is None else scale[0] * x
        return super().forward(x) + len(rest) + 2 * ("more" in more)


@pytest.mark.parametrize("capture", ["export", "blocks"])
def test_none_is_a_value_where_it_is_no_default(capture):
    model, x = made(Given), rows(4)
    calls = [
        ((x, None), {}),
        ((), {"x": x, "mask": None}),
        ((x, None, None), {}),
        ((x, None), {"scale": None}),
        ((x, None, (2.0,), None), {}),
        ((x, None), {"more": None}),
    ]
    for args, kwargs in calls:
        fast = compiled(model, *args, example_kwargs=kwargs, capture=capture)
        with torch.no_grad():
            equal_bits(fast(*args, **kwargs), model(*args, **kwargs))
    plain = compiled(model, x, None, capture=capture)
    for args, kwargs in calls[2:]:
        with pytest.raises(CaptureError, match="other arguments"):
            plain(*args, **kwargs)
    with pytest.raises(CaptureError, match="other arguments"):
        compiled(model, x, None, (2.0,), None, capture=capture)(x, None, (2.0,))


def test_containers_of_tensors():
    model = made(Nested)

    def call(count: int) -> tuple[Any, Any]:
        return {"left": rows(count), "right": rows(count, seed=2)}, (rows(count, 1), rows(count, seed=3))

    fast = compiled(model, *call(4))
    assert [leaf.path for leaf in fast.program.signature.inputs] == ["pair[0]", "pair[1]", "views.left", "views.right"]
    with torch.no_grad():
        equal_bits(fast(*call(3)), model(*call(3)))
    views, pair = call(3)
    with pytest.raises(CaptureError, match="other arguments"):
        fast({"left": views["left"]}, pair)


@pytest.mark.parametrize(
    ("model", "options", "said"),
    [
        (made(Net), {}, ["no example input", "where:  Net", "example_inputs=(x,)"]),
        (made(Net), {"example_inputs": ()}, ["no example input"]),
        (made(Net), {"example_inputs": {"x": rows(4)}}, ["takes a tuple", "example_kwargs="]),
        (made(Net), {"example_inputs": ("text",)}, ["holds no tensor", "real tensors"]),
        (lambda x: x, {"example_inputs": (rows(4),)}, ["takes a module", "got:    function", "wrap a function"]),
        (42, {"example_inputs": (rows(4),)}, ["takes a module", "got:    int", "torch.nn.Module"]),
        (Net, {"example_inputs": (rows(4),)}, ["takes a module", "got:    type"]),
        (made(Net), {"example_inputs": (rows(4),), "capture": "trace"}, ["unknown way to capture", "export"]),
        (made(Net), {"example_inputs": (rows(4),), "dynamic": False}, ["dynamic= names", "got:    False", "None to find"]),
        (made(Net), {"example_inputs": (rows(4),), "batch_axis": 3}, ["no input has that batch axis", "x: [4, 16]"]),
        (made(Net), {"example_inputs": (rows(4), rows(4))}, ["too many positional arguments"]),
    ],
)
def test_what_is_no_model_or_no_example(model, options, said):
    with pytest.raises(CaptureError) as caught:
        eecompile(model, **options)
    for text in said:
        assert text in str(caught.value)


def test_a_single_tensor_is_an_example():
    fast = eecompile(made(Net), example_inputs=rows(4))
    assert fast.program.signature.inputs[0].path == "x"


def test_a_compiled_model_is_not_compiled_again():
    fast = compiled(made(Net), rows(4))
    with pytest.raises(CaptureError, match="compiled already"):
        eecompile(fast, example_inputs=(rows(4),))


class Fields(Net):
    def forward(self, batch: Any) -> Tensor:
        return super().forward(batch["left"] + batch["right"] * batch["more"]["scale"])


def fields(kind: Any = dict, n: int = 4, turned: bool = False) -> Any:
    pairs = [("left", rows(n)), ("right", rows(n)), ("more", kind({"scale": rows(n, 1), "none": None}))]
    return kind(pairs[::-1] if turned else pairs)


@pytest.mark.parametrize("example", [dict, OrderedDict, UserDict])
@pytest.mark.parametrize("call", [dict, OrderedDict, UserDict])
def test_mappings_in_any_order_and_of_any_class(example, call):
    model = made(Fields)
    fast = compiled(model, fields(example))
    given = fields(call, 3, turned=True)
    with torch.no_grad():
        equal_bits(fast(given), model(given))
        for other in (
            {k: v for k, v in given.items() if k != "left"},
            dict(given, extra=rows(3)),
            dict(given, left=None),
            dict(given, more={"scale": 2.0, "none": None}),
        ):
            with pytest.raises(CaptureError, match="other arguments"):
                fast(other)


def test_what_a_tokenizer_returns_is_a_dict():
    transformers = pytest.importorskip("transformers")
    model = made(Fields)
    kind = transformers.BatchEncoding
    fast = compiled(model, fields(lambda x: dict(x)))
    given = fields(lambda x: kind(dict(x)), 3, turned=True)
    with torch.no_grad():
        equal_bits(fast(given), model(given))


class Keywords(Net):
    def forward(self, x: Tensor, **named: Tensor) -> Tensor:
        return super().forward((x + named["class"]) * named["lambda"])


class Named(Net):
    def __init__(self) -> None:
        super().__init__()
        self.more = nn.ModuleDict({"class": nn.Linear(WIDTH, WIDTH)})

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.more["class"](x))


def test_arguments_named_like_keywords():
    model = made(Keywords)

    def call(n: int) -> dict[str, Tensor]:
        return {"x": rows(n), "class": rows(n), "lambda": rows(n, 1)}

    fast, given = compiled(model, example_kwargs=call(4)), call(3)
    with torch.no_grad():
        equal_bits(fast(**given), model(**given))


def test_modules_named_like_keywords_are_refused_by_name():
    with pytest.raises(CaptureError, match="like a keyword of Python") as caught:
        compiled(made(Named), rows(4))
    assert "where:  more.class" in str(caught.value)


class Inner(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.name = Net(), name
        self.add_module(name, nn.Linear(CLASSES, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.get_submodule(self.name)(self.net(x))


class Outer(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.inner = Inner(name)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class Scaled(Inner):
    """Buffers of the model itself under names that graphs use too."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.register_buffer("eecompile_thresholds", torch.full((CLASSES,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.eecompile_thresholds


@pytest.mark.parametrize("kind", [Inner, Outer, Scaled])
@pytest.mark.parametrize("name", ["eecompile_heads", "eecompile_model", "graph", "meta", "code"])
def test_names_that_the_graph_needs(name, kind, tmp_path):
    model, x = kind(name).eval(), rows(4)
    fast = compiled(model, x)
    with torch.no_grad():
        equal_bits(fast(x), model(x))
        for p in model.parameters():
            p.mul_(0.9)
        model.load_state_dict({n: 0.5 * t for n, t in model.state_dict().items()}, assign=True)
        want = model(x)
        equal_bits(fast(x), want)
        fast.save(tmp_path / "program")
        equal_bits(load(tmp_path / "program")(x), want)


def test_a_parameter_of_the_model_itself_under_such_a_name_is_refused():
    model = Net()
    model.register_parameter("meta", nn.Parameter(torch.ones(CLASSES)))
    inner, model.forward = model.forward, lambda x: inner(x) * model.meta
    with pytest.raises(CaptureError, match="needs for itself") as caught:
        compiled(model.eval(), rows(4))
    assert "where:  meta" in str(caught.value)
