"""Programs compiled by AOTInductor, from Python and from C++, against the reference."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from eecompile import CompiledModule, ExportError, eecompile, strategies
from eecompile.export import runtimes, verify
from eecompile.export.description import KEY

ROOT = Path(__file__).parents[2]
compiles = [pytest.mark.nightly, pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")]


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def fast(images: torch.Tensor) -> CompiledModule:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        blocks = [m for c in (3, 16, 16, 16) for m in (nn.Conv2d(c, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())]
        model = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)).eval()
        made = eecompile(model, strategies.Branchy(exits=2), example_inputs=(images[:4],))
    with torch.no_grad():
        for weight in made.head_parameters():
            weight.mul_(10)  # fresh heads are as unsure of one row as of another
    made.set_thresholds([1.0, 1.0])
    sure = made.observe(images).confidences
    assert sure is not None
    first = float(sure[0].quantile(0.5))  # between two rows
    made.set_thresholds([first, float(sure[1][sure[0] < first].quantile(0.4))])
    return made


@pytest.fixture(scope="module")
def package(fast: CompiledModule, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fast.export(tmp_path_factory.mktemp("aoti") / "net.pt2", target="aoti")


class TestCompiled:
    pytestmark = compiles

    def test_rows_are_the_references_at_every_batch_size(
        self, fast: CompiledModule, package: Path, images: torch.Tensor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(verify._Check, "_measure", lambda self: None)  # times of a busy machine
        report = fast.verify_export(package, [(images, None)])
        assert report.ok, str(report)
        assert report.target == "aoti" and report.sizes == [1, 2, 5, 64]

    @pytest.mark.skipif(shutil.which("cmake") is None, reason="there is no cmake")
    def test_cpp_gives_the_same_rows(
        self, fast: CompiledModule, package: Path, images: torch.Tensor, tmp_path: Path
    ) -> None:
        def run(*command: Any) -> str:
            done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
            assert not done.returncode, done.stderr[-2000:]
            return done.stdout

        run("cmake", "-S", ROOT / "examples/cpp", "-B", tmp_path, f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}")
        run("cmake", "--build", tmp_path)
        images.numpy().tofile(tmp_path / "rows.bin")
        lines = run(tmp_path / "rows", package, tmp_path / "rows.bin", *images.shape[1:]).split("\n")[:-1]
        want = fast.run(images)
        assert [line.split()[:2] for line in lines] == [
            [str(int(label)), str(int(at))] for label, at in zip(want.output.argmax(-1), want.exit_index, strict=True)
        ]


def test_code_that_gives_other_outputs_is_refused(
    fast: CompiledModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the compiler had made something else of the program: what was there before stays."""

    def compiled(program: Any, *, package_path: str, inductor_configs: Any) -> None:
        text = inductor_configs["aot_inductor.metadata"][KEY]
        torch.export.save(program, package_path, extra_files={f"{KEY}.json": text})

    def opened(path: Path) -> runtimes.Opened:
        found = usual(path)
        return runtimes.Opened(found.description, lambda flat: [found.call(flat)[0] * 1.01, *found.call(flat)[1:]])

    usual = runtimes.opened
    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", compiled)
    monkeypatch.setattr("eecompile.export.verify.opened", opened)
    (tmp_path / "net.pt2").write_bytes(b"before")
    with pytest.raises(ExportError, match=r"is not the program(.|\n)*differs by"):
        fast.export(tmp_path / "net.pt2", target="aoti")
    assert (tmp_path / "net.pt2").read_bytes() == b"before"
