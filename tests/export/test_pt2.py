"""Every kind of program as a `.pt2` file that torch loads alone, against the reference."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from eecompile import ExportError, eecompile, strategies
from eecompile.export.runtimes import opened
from eecompile.passes.lower_cond import lower_cond
from tests.export.cases import runner_of, same_as_reference, undecided
from tests.kinds import KINDS, Program
from tests.support import CLOSED, close, compiled, nightly, run_by

REFUSED = {"captured as blocks": "captured as blocks", "halting per position": "halting at each position"}
QUICK = ("patience", "gates", "router to branches")
KIND = [pytest.param(k, marks=() if k in QUICK else pytest.mark.nightly) for k in KINDS if k not in REFUSED]


@pytest.mark.parametrize("name", KIND)
def test_a_file_is_the_reference_at_every_batch_size(name: str, tmp_path: Path) -> None:
    """Loaded by `torch.export.load`, with settings put into its buffers."""
    kind = KINDS[name]
    fast = kind.build().fast
    undecided(fast)
    path = fast.export(tmp_path / "net.pt2")
    taken = same_as_reference(fast, kind.call, runner_of(torch.export.load(path), fast))
    if fast.exits:
        assert len(taken) > 1


@pytest.mark.parametrize("name", [n if n == "captured as blocks" else nightly(n) for n in REFUSED])
def test_what_has_no_exported_form_is_refused(name: str, tmp_path: Path) -> None:
    fast = KINDS[name].build().fast
    undecided(fast)
    with pytest.raises(ExportError, match=REFUSED[name]) as refused:
        fast.export(tmp_path / "net.pt2")
    assert refused.value.hint
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def exits() -> Program:
    return KINDS["exits by a score"].build()


def test_torch_alone_runs_it(exits: Program, tmp_path: Path) -> None:
    """In a process that cannot import this package."""
    fast = exits.fast
    fast.set_thresholds(0.55)
    path = fast.export(tmp_path / "net.pt2")
    (x,), _ = exits.kind.call(9, 5)
    torch.save(x, tmp_path / "x.pt")
    code = (
        "import sys, torch; sys.modules['eecompile'] = None\n"
        f"y, index, _ = torch.export.load({str(path)!r}).module()(torch.load({str(tmp_path / 'x.pt')!r}))\n"
        "print(index.tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout.strip() == str(run_by("reference", fast, x).exit_index.tolist())


def test_a_closed_exit_is_not_in_it(exits: Program, tmp_path: Path) -> None:
    fast = exits.fast
    sizes = {}
    for closed in (False, True):
        fast.set_thresholds([0.5, CLOSED if closed else 0.5])
        program = torch.export.load(fast.export(tmp_path / "net.pt2"))
        sizes[closed] = sum(n.target is torch.ops.higher_order.cond for m in graphs(program) for n in m.graph.nodes)
    assert sizes == {False: 2, True: 1}
    fast.set_thresholds(CLOSED)
    assert not [m for m in graphs(torch.export.load(fast.export(tmp_path / "net.pt2"))) if "cond" in str(m.graph)]


def test_conditions_of_stages_are_not_nested() -> None:
    """Tracers go through a nested branch several times at each level: many exits could not be exported."""
    blocks = [nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(5)]
    strategy = strategies.Branchy(exits=tuple("0123"), head="linear", max_head_share=99.0)
    fast = compiled(nn.Sequential(*blocks, nn.Linear(4, 2)).eval(), strategy, example_inputs=(torch.randn(4, 4),))
    fast.set_thresholds(0.5)
    program = lower_cond(fast.program, fast.settings)
    conds = [sum(n.target is torch.ops.higher_order.cond for n in m.graph.nodes) for m in graphs(program)]
    assert sorted(conds) == [*[0] * 8, 4]


class Halving(nn.Module):
    """Each block halves a length that is free."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(9, 4)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(3))
        self.head = nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x[:, torch.arange(0, x.shape[1], 2)])
        return self.head(x.mean(1))


@pytest.mark.parametrize("target", ["pt2", pytest.param("onnx", marks=pytest.mark.nightly)])
def test_what_survives_may_have_a_size_that_is_computed(target: str, tmp_path: Path) -> None:
    if target == "onnx":
        pytest.importorskip("onnxruntime")
    strategy = strategies.Branchy(exits=2, head="linear", max_head_share=99.0)
    fast = compiled(Halving().eval(), strategy, example_inputs=(torch.randint(9, (4, 20)),))
    fast.set_thresholds([float(c.median()) for c in fast.observe(torch.randint(9, (16, 33))).confidences[:-1]])
    run = opened(fast.export(tmp_path / f"net.{target}", target=target)).run
    for length in (20, 33, 64):
        ids = torch.randint(9, (16, length), generator=torch.Generator().manual_seed(length))
        output, index, _ = run([ids])
        want = run_by("reference", fast, ids)
        assert torch.equal(index, want.exit_index)
        close(output, want.output)


def test_weights_are_there_once(exits: Program, tmp_path: Path) -> None:
    fast = exits.fast
    fast.set_thresholds(0.5)
    program = torch.export.load(fast.export(tmp_path / "net.pt2"))
    inner = [name for m in graphs(program) for name, _ in (*m.named_parameters(), *m.named_buffers())]
    assert inner == [], "weights of a branch are operands, not constants of its own"
    assert len({t.data_ptr() for t in program.state_dict.values()}) == len(program.state_dict)
    own = dict(exits.model.named_parameters())
    assert own.keys() <= program.state_dict.keys(), "parameters keep the names that they have in the model"


def graphs(program: torch.export.ExportedProgram) -> list[torch.fx.GraphModule]:
    return [m for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]


ROWS: list[tuple[int, int]] = []


@torch.library.custom_op("eecompile_tests::count_rows", mutates_args=())
def count_rows(x: Tensor, stage: int) -> Tensor:
    ROWS.append((stage, x.shape[0]))
    return x.clone()


@count_rows.register_fake
def _(x: Tensor, stage: int) -> Tensor:
    return torch.empty_like(x)


class Counted(nn.Module):
    """Three stages that note how many rows they are given."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stages = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        for k, stage in enumerate(self.stages):
            x = count_rows(torch.relu(stage(x)), k)
        return self.head(x)


def test_no_stage_is_entered_without_rows(tmp_path: Path) -> None:
    fast = eecompile(Counted(), "branchy", example_inputs=(torch.randn(6, 4),))
    confidences = fast.observe(torch.randn(64, 4)).confidences
    fast.set_thresholds([float(c.median()) for c in confidences[:-1]])
    module = torch.export.load(fast.export(tmp_path / "net.pt2")).module()
    seen = set()
    for seed in range(8):
        for size in (1, 2, 5, 64):
            x = torch.randn(size, 4, generator=torch.Generator().manual_seed(seed))
            index = run_by("reference", fast, x).exit_index
            ROWS.clear()
            assert torch.equal(module(x)[1], index)
            entered = [(k, int((index >= k).sum())) for k in range(3)]
            assert [(k, n) for k, n in entered if n] == ROWS
            seen.add(tuple(n for _, n in ROWS))
    assert len({len(rows) for rows in seen}) == 3, "no batch ended at one of the exits"
