"""What is saved by one process and loaded by another gives equal results, keeps its settings, and can be trained on."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import eecompile as package
from eecompile import ArtifactError, CompiledModule, EecompileError, load, strategies
from tests.artifact import programs
from tests.capture.nets import CLASSES, made, rows
from tests.support import both, equal_bits, nightly, same_result
from tests.support import compiled as eecompile

# Runs where neither the tests nor the models can be imported.
READER = """
import json, sys
from pathlib import Path
import eecompile

root = Path(sys.argv[1])
said = {}
for place in sorted(p for p in root.iterdir() if p.is_dir()):
    fast = eecompile.load(place)
    assert not [n for n in sys.modules if n.startswith("tests")]
    from safetensors.torch import load_file, save_file
    import torch
    torch.set_num_threads(1)
    with torch.no_grad():
        result = fast.run(**load_file(root / f"{place.name}.in"))
    out = {"exit_index": result.exit_index, "confidence": result.confidence, "cost": result.cost}
    out |= {f"leaf{i}": t for i, t in enumerate(fast.program.signature.flatten_output(result.output))}
    save_file({k: t.contiguous() for k, t in out.items()}, root / f"{place.name}.out")
    said[place.name] = {
        "type": type(result.output).__name__,
        "exits": [[e.name, e.cut, e.threshold, e.temperature, e.head_kind, e.criterion.name] for e in fast.exits],
        "executor": fast.executor,
        "repr": repr(fast),
        "notes": list(fast.notes),
    }
print(json.dumps(said))
"""


OFTEN = ("bert", "custom", "tree")
of_all_kinds = pytest.mark.parametrize("names", [OFTEN, nightly(tuple(sorted(set(programs.PROGRAMS) - set(OFTEN))))])
Saved = Callable[[str], tuple[Path, CompiledModule]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Where a program of this name is saved, and the program; made at the first use."""

    @cache
    def get(name: str) -> tuple[Path, CompiledModule]:
        place = tmp_path_factory.mktemp("programs") / name
        fast = programs.adjusted(programs.PROGRAMS[name](), name)
        fast.save(place)
        return place, fast

    return get


@of_all_kinds
def test_another_process_gives_equal_results(saved, names, tmp_path):
    fasts = {}
    root = tmp_path / "programs"
    for name in names:
        made_by, fasts[name] = saved(name)
        shutil.copytree(made_by, root / name)
        save_file(programs.inputs(name), root / f"{name}.in")
    place = Path(package.__file__).resolve().parents[1]
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n" + READER
    (tmp_path / "eecompile").symlink_to(place / "eecompile")  # the package, and nothing else of the tree
    command = [sys.executable, "-W", "error", "-c", code, str(root)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300, env=environment())
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr == ""
    said = json.loads(done.stdout)
    assert sorted(said) == sorted(fasts)
    for name, fast in fasts.items():
        with torch.no_grad():
            result = fast.run(**programs.inputs(name))
        got = load_file(root / f"{name}.out")
        assert torch.equal(got.pop("exit_index"), result.exit_index), name
        assert len(set(result.exit_index.tolist())) > 1, f"{name}: rows leave at several places"
        assert torch.equal(got.pop("confidence"), result.confidence), name
        assert torch.equal(got.pop("cost"), result.cost), name
        leaves = fast.program.signature.flatten_output(result.output)
        equal_bits([got[f"leaf{i}"] for i in range(len(got))], leaves)
        shown = said[name]
        assert shown["type"] == type(result.output).__name__
        now = [[e.name, e.cut, e.threshold, e.temperature, e.head_kind, e.criterion.name] for e in fast.exits]
        assert shown["exits"] == now
        assert shown["executor"] == "compact"
        assert "loaded program" in shown["repr"]
        assert shown["notes"][:-1] == list(fast.notes)


def environment() -> dict[str, str]:
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return env | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.mark.parametrize("name", [n if n in OFTEN else nightly(n) for n in sorted(programs.PROGRAMS)])
def test_executors_agree_after_loading_and_saving_again(saved, name, tmp_path):
    place, fast = saved(name)
    again = load(place)
    call = programs.inputs(name)
    compact, reference = both(again, **call)
    same_result(compact, reference)
    again.save(tmp_path / "again")
    once_more = load(tmp_path / "again")
    with torch.no_grad():
        equal_bits(once_more(**call), fast(**call))
        once_more.set_thresholds(2.0)
        equal_bits(once_more.full(**call), fast.full(**call))
    assert once_more.notes[: len(fast.notes)] == fast.notes
    assert sum(n.startswith("loaded from") for n in once_more.notes) == 1


def test_the_executor_that_was_asked_for_is_kept(tmp_path):
    fast = programs.net()
    fast.save(tmp_path / "auto")
    assert "auto" in load(tmp_path / "auto").executor_reason
    fast.executor = "reference"
    fast.save(tmp_path / "reference")
    assert load(tmp_path / "reference").executor == "reference"
    assert load(tmp_path / "reference", executor="compact").executor == "compact"


def batches(count: int = 4) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [(rows(6, 1, 8, 8, seed=20 + k), torch.randint(0, CLASSES, (6,), generator=generator)) for k in range(count)]


def test_training_goes_on_after_loading_as_it_would_have_without(tmp_path):
    """The train-mode capture is saved where the strategy trains the trunk; both captures share parameters again."""
    fast = programs.conv(trunk=True)
    fast.save(tmp_path / "joint")
    again = load(tmp_path / "joint")
    before = {n: p.clone() for n, p in again.program.source.named_parameters()}
    for one in (fast, again):
        one.fit(batches(), epochs=2, lr=0.01, seed=5, progress=False)
    moved = [n for n, p in again.program.source.named_parameters() if not torch.equal(p, before[n])]
    assert len(moved) == len(before)
    for (n, p), (m, q) in zip(fast.named_parameters(), again.named_parameters(), strict=True):
        assert n == m
        assert torch.equal(p, q), n
    for (n, p), (_, q) in zip(fast.named_buffers(), again.named_buffers(), strict=True):
        assert torch.equal(p, q), f"{n}: batch statistics"
    x = rows(5, 1, 8, 8)
    with torch.no_grad():
        equal_bits(again(x), fast(x))
    again.save(tmp_path / "trained")
    with torch.no_grad():
        equal_bits(load(tmp_path / "trained")(x), fast(x))


def test_heads_can_be_trained_after_loading_the_trunk_only_where_its_capture_was_saved(tmp_path):
    fast = programs.conv()
    fast.save(tmp_path / "heads")
    assert not list((tmp_path / "heads").glob("train-*"))
    again = load(tmp_path / "heads")
    before = [p.clone() for p in again.head_parameters()]
    again.fit(batches(), epochs=1, progress=False)
    assert not any(torch.equal(p, q) for p, q in zip(before, again.head_parameters(), strict=True))
    with pytest.raises(EecompileError) as caught:
        again.fit(batches(), epochs=1, trunk=True, progress=False)
    assert "no train-mode capture" in str(caught.value)
    assert "trunk=True" in str(caught.value)


def test_a_trunk_that_was_trained_once_can_be_trained_again(tmp_path):
    fast = programs.conv()
    fast.fit(batches(), epochs=1, trunk=True, progress=False)
    fast.save(tmp_path / "trained")
    again = load(tmp_path / "trained")
    before = {n: p.clone() for n, p in again.named_parameters()}
    again.fit(batches(), epochs=1, trunk=True, progress=False)
    assert [n for n, p in again.named_parameters() if torch.equal(p, before[n])] == [], "these were not trained"


def test_a_shared_head_is_the_models_own_after_loading(saved):
    place, _ = saved("shared")
    again = load(place)
    own = {id(p) for p in again.program.source.parameters()}
    assert not list(again.head_parameters())
    assert all(id(p) in own for p in again.heads.parameters())
    assert not load_file(next(place.glob("heads-*")))


def test_loading_onto_a_device_and_thresholds_that_change_later(saved):
    place, fast = saved("conv")
    again = load(place, device="cpu")
    again.set_thresholds({"exit_1": 0.0})
    assert [e.threshold for e in again.exits] == [fast.exits[0].threshold, 0.0]
    assert bool((again.run(**programs.inputs("conv")).exit_index < 2).all())


@of_all_kinds
def test_nothing_is_pickled(saved, names):
    files = [path for name in names for path in saved(name)[0].rglob("*") if path.is_file()]
    for path in files:
        if path.suffix == ".pt2":
            with zipfile.ZipFile(path) as archive:
                names_inside = [i.filename for i in archive.infolist() if i.file_size]
            assert not [n for n in names_inside if n.endswith(".pkl") or "sample_inputs" in n], path
    assert {path.suffix for path in files} == {".pt2", ".json", ".safetensors"}


def test_what_cannot_be_saved_says_so_and_leaves_nothing(tmp_path):
    fast = eecompile(made(programs.Named), "branchy", example_inputs=(rows(4),))
    with pytest.raises(ArtifactError) as caught:
        fast.save(tmp_path / "named")
    assert "a container that cannot be saved" in str(caught.value)
    assert "Answer" in str(caught.value)
    assert not (tmp_path / "named").exists()

    class Odd(programs.Wide):
        def forward(self, h: torch.Tensor) -> torch.Tensor:
            return super().forward(h if bool(h.sum() > -1e9) else -h)

    odd = programs.net(head=Odd())
    with pytest.raises(ArtifactError) as caught:
        odd.save(tmp_path / "odd")
    text = str(caught.value)
    assert "a custom head cannot be exported" in text
    assert "where:  exit_0" in text
    assert "built-in head" in text
    assert not list((tmp_path / "odd").iterdir())
    programs.net().save(tmp_path / "odd")
    with pytest.raises(ArtifactError):
        odd.save(tmp_path / "odd")
    assert load(tmp_path / "odd").exits[0].head_kind == "linear", "the older program is whole"
    assert len(list((tmp_path / "odd").iterdir())) == 3


def test_two_strategies_know_each_other_by_name(saved):
    assert isinstance(load(saved("bert")[0]).strategy, strategies.MeBert)
    assert load(saved("custom")[0]).strategy == strategies.Branchy(exits=2)
