"""A program of torch.export, or its `.pt2` file, as the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram, export

from eecompile import CaptureError, UnsupportedModelError
from tests.capture.nets import Net, compiled, made, rows
from tests.support import close, equal_bits
from tests.support import compiled as eecompile


class Scaled(Net):
    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return super().forward(x * scale)


class Centred(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(0))


def exported(kind: type[Net] = Net, *args: Tensor, fixed: bool = False) -> ExportedProgram:
    args = args or (rows(5),)
    batch = Dim("batch", min=1, max=1024)
    return export(made(kind), args, dynamic_shapes=None if fixed else tuple({0: batch} for _ in args), strict=False)


def test_an_exported_program_is_a_model():
    program = exported()
    fast = compiled(program, rows(4))
    for count in (1, 6):
        with torch.no_grad():
            equal_bits(fast(rows(count)), made(Net)(rows(count)))
            equal_bits(fast(x=rows(count)), made(Net)(rows(count)))
    assert "an exported program" in fast.notes
    assert "captured" not in repr(program)


def test_the_module_of_a_program_is_a_model_with_one_mode():
    """Its `train` and `eval` raise."""
    module = exported().module()
    fast = compiled(module, rows(4))
    with torch.no_grad():
        equal_bits(fast(rows(3)), made(Net)(rows(3)))
    fast.fit([(rows(6), torch.arange(6) % 2)], epochs=1)
    with pytest.raises(CaptureError, match="no train mode"):
        fast.fit([(rows(6), torch.arange(6) % 2)], epochs=1, trunk=True)


def test_a_file_is_a_model_too_and_needs_no_example(tmp_path):
    path = tmp_path / "net.pt2"
    torch.export.save(exported(), path)
    for name in (path, str(path)):
        fast = eecompile(name)
        fast.set_thresholds(2.0)
        with torch.no_grad():
            close(fast(rows(3)), made(Net)(rows(3)), 1e-6)
    assert len(fast.exits) == 3


def test_a_loaded_program_keeps_working(tmp_path):
    from eecompile import load

    fast = compiled(exported(), rows(4))
    fast.save(tmp_path / "saved")
    again = load(tmp_path / "saved")
    equal_bits(again(rows(3)), fast(rows(3)))


def test_keyword_arguments_go_by_name():
    """In another order than the program has them."""
    program = exported(Scaled, rows(5), rows(5, 1))
    fast = eecompile(program, example_kwargs={"scale": rows(4, 1), "x": rows(4)})
    fast.set_thresholds(2.0)
    assert [tuple(t.shape) for t in fast.example] == [(4, 1), (4, 16)]  # by name, as calls are flattened
    with torch.no_grad():
        equal_bits(fast(scale=rows(3, 1), x=rows(3)), made(Scaled)(rows(3), rows(3, 1)))
    with pytest.raises(CaptureError, match="no such argument"):
        eecompile(program, example_kwargs={"scales": rows(4, 1), "x": rows(4)})


def test_rows_that_influence_one_another_are_refused_with_and_without_an_example():
    for options in ({"example_inputs": (rows(4),)}, {}):
        with pytest.raises(UnsupportedModelError, match="samples influence one another"):
            eecompile(exported(Centred), **options)


def test_without_any_example_that_is_said():
    program = exported()
    program._example_inputs = None
    fast = eecompile(program)
    assert any("not checked" in n for n in fast.notes)


def test_a_fixed_batch_says_how_to_export():
    with pytest.raises(CaptureError) as caught:
        eecompile(exported(fixed=True))
    text = str(caught.value)
    assert "has a fixed batch" in text
    assert "x: [5, 16]" in text
    assert "torch.export.Dim" in text


def test_one_row_as_the_example_is_refused_here_too():
    with pytest.raises(CaptureError, match="a batch of 1"):
        eecompile(exported(), example_inputs=(rows(1),))


def test_blocks_need_the_python_model():
    with pytest.raises(CaptureError, match="Python model"):
        eecompile(exported(), example_inputs=(rows(4),), capture="blocks")


@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04 truncated", b"a text"])
def test_a_file_that_is_none(tmp_path: Path, content: bytes | None):
    path = tmp_path / "net.pt2"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CaptureError) as caught:
        eecompile(path)
    text = str(caught.value)
    assert ("there is no such file" if content is None else "not a program of torch.export") in text
    assert str(path) in text
