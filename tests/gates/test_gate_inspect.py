"""Gates as people see them: explain, the tree, tables, why a row cost what it did, and the command line."""

from __future__ import annotations

import json
import sys

import pytest

from eecompile import strategies
from eecompile.cli import main
from eecompile.inspect import to_text, where
from eecompile.inspect.outline import outline
from tests.inspect.conftest import images, resnet
from tests.support import compiled as eecompile


@pytest.fixture(scope="module")
def fast():
    found = eecompile(resnet(), strategies.SkipNet(open_bias=0.0), example_inputs=(images(4),))
    found.set_gate_thresholds({"gate_0": 0.0, "gate_1": 2.0})
    return found


def test_explain_lists_gates(fast):
    gates = fast.explain().to_dict()["gates"]
    assert [g["region"] for g in gates] == ["layer1.0", "layer1.1", "layer2.1", "layer3.1"]
    assert [g["threshold"] for g in gates] == [0.0, 2.0, 0.5, 0.5]
    assert set(gates[0]) == {"name", "region", "kind", "node", "unit", "unit_cost", "threshold", "saves", "depth", "trained"}
    text = str(fast)
    assert "4 gates" in text
    assert "gate_0 layer1.0 (block): always open" in text
    assert "gate_1 layer1.1 (block): always closed" in text
    assert "saves when closed" in to_text(fast, "table")


def test_gated_blocks_keep_their_share_of_the_cost(fast):
    shares = {r.name: r.share for _, _, r in outline(fast, collapse=False).regions()}
    gates = {g.region: g.saves for g in fast.gates}
    assert all(shares[name] == pytest.approx(saves, abs=1e-3) for name, saves in gates.items())
    assert sum(shares.values()) == pytest.approx(1.0, abs=1e-6)
    assert not [name for name in shares if "gate" in name]


def test_why_a_row_cost_what_it_did(fast):
    x = images(4)
    found = where(fast, x)
    assert [r.full_prediction for r in found.rows] == fast.full(x).argmax(1).tolist()
    assert all(r.gates["gate_0"] and not r.gates["gate_1"] for r in found.rows)
    assert "of 4 gates were closed: gate_1" in found.rows[0].why
    assert "gate_0 100.0%, gate_1 0.0%" in str(found)
    json.dumps(found.to_dict())


@pytest.mark.nightly
def test_the_command_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "net.py").write_text(
        "import torch\nfrom eecompile.cli.digits_net import DigitsNet\n"
        "def build():\n    torch.manual_seed(0)\n    return DigitsNet(4).eval()\n"
    )

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["eecompile", *args, "--json"])
        with pytest.raises(SystemExit) as ended:
            main()
        text = capsys.readouterr()
        assert ended.value.code in (0, None), text.err[-2000:]
        return json.loads(text.out)

    place = str(tmp_path / "program")
    built = call(
        "rewrite", f"{tmp_path / 'net.py'}:build", "--input", "x=float32[4,1,8,8]", "--strategy", "skipnet", "-o", place
    )
    assert len(built["gates"]) == 7
    fitted = call("fit", place, "--data", "digits:val", "--epochs", "1", "--heads-only")
    assert len(fitted["rows"][0]["gates"]["open"]) == 7
    assert fitted["curve"][0]["stage"] == "hard gates"
    calibrated = call("calibrate", place, "--data", "digits:val", "--max-drop", "0.3", "--no-guarantee")
    assert len(calibrated["gates"]) == 7
    found = call("evaluate", place, "--data", "digits:val")
    assert len(found["gates"]) == 7
    assert found["drop"] <= 0.3
    ran = call("run", place, "--data", "digits:val", "--rows", "3")
    assert set(ran["rows"][0]["gates"]) == {f"gate_{i}" for i in range(7)}
