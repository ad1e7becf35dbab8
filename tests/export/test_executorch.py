"""Programs for one row as `.pte` files, run by ExecuTorch, against the reference."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from eecompile import ExportError, strategies
from eecompile.passes.lower_cond import lower_cond
from tests.export.cases import runner_of, same_as_reference, undecided
from tests.export.test_pt2 import QUICK, REFUSED, Halving
from tests.kinds import KINDS, Call, Kind
from tests.support import compiled

KIND = [pytest.param(k, marks=() if k in QUICK[:1] else pytest.mark.nightly) for k in KINDS if k not in REFUSED]


@pytest.mark.parametrize("name", KIND)
def test_the_form_for_one_row_is_the_reference_and_gathers_nothing(name: str) -> None:
    """What is translated: it needs no ExecuTorch."""
    kind = KINDS[name]
    fast = kind.build().fast
    undecided(fast)
    program = lower_cond(fast.program, fast.settings, single=True)
    used = {str(n.target) for m in program.graph_module.modules() if hasattr(m, "graph") for n in m.graph.nodes}
    assert not [name for name in used if "nonzero" in name or "index_copy" in name]
    run, taken = runner_of(program, fast), set[int]()
    for seed in range(6):
        taken |= same_as_reference(fast, partial(call_at, kind, seed), run, sizes=(1,))
    assert not fast.exits or len(taken) > 1


def call_at(kind: Kind, seed: int, batch: int, _: int) -> Call:
    return kind.call(batch, seed)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["exits by energy", "gates"])
def test_the_runtime_gives_what_the_reference_gives(name: str, tmp_path: Path) -> None:
    """With rows that leave at every exit, or pass every gate: what one condition gives is there after the next."""
    pytest.importorskip("executorch.exir")
    kind = KINDS[name]
    fast = kind.build().fast
    undecided(fast)
    (x,), _ = kind.call(32, 1)
    if fast.exits:
        fast.set_thresholds([float(c.median()) for c in fast.observe(x).confidences[:-1]])
    report = fast.verify_export(fast.export(tmp_path / "net.pte", target="executorch"), [(x, None)], rounds=3)
    assert report.ok, str(report)
    assert len(report.times) == len(fast.exits) + 1


@pytest.mark.filterwarnings("ignore")
def test_sizes_need_a_bound(tmp_path: Path) -> None:
    pytest.importorskip("executorch.exir")
    strategy = strategies.Branchy(exits=2, head="linear", max_head_share=99.0)
    fast = compiled(Halving().eval(), strategy, example_inputs=(torch.randint(9, (4, 20)),))
    fast.set_thresholds(0.5)
    with pytest.raises(ExportError, match="no upper bound"):
        fast.export(tmp_path / "net.pte", target="executorch")
    assert not list(tmp_path.iterdir())
