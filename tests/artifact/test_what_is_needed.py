"""What a saved program needs: its export, and the repeated unit that the user named."""

from __future__ import annotations

import pytest
import torch

from eecompile import ArtifactError, load, strategies
from tests import cascades, zoo_plain
from tests.support import again, both, same_result
from tests.support import compiled as eecompile


def test_a_program_without_its_export_is_not_saved(zoo, tmp_path):
    fast = again(zoo("lenet").fast, strategies.Branchy(exits=1))
    with pytest.raises(ArtifactError, match="the export that it was made from is not there"):
        fast.save(tmp_path / "program")
    assert not (tmp_path / "program").exists()


def test_the_named_unit_is_that_of_the_training_graph_and_of_the_loaded_program(tmp_path):
    model = cascades.seeded(lambda: zoo_plain.CifarResNet(2, 4), 5)
    x = 2 * torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    strategy = strategies.Branchy(exits="every-block", trunk=True, max_head_share=9.0)
    fast = eecompile(model, strategy, example_inputs=(x,), blocks="layer*")
    named = ["layer1", "layer2", "layer3"]
    assert [b.name for b in fast.program.structure.blocks] == named
    training = fast.training_graphs.train_program()
    assert [b.name for b in training.structure.blocks] == named
    assert [e.cut for e in training.exits] == [e.cut for e in fast.program.exits]
    fast.fit([(x, torch.arange(6) % 2)], progress=False)
    fast.save(tmp_path / "program")
    same = load(tmp_path / "program")
    assert [b.name for b in same.program.structure.blocks] == named
    assert [b.name for b in same.training_graphs.train_program().structure.blocks] == named
    fast.set_thresholds(0.3)
    same.set_thresholds(0.3)
    same_result(*both(same, x))
    same_result(same.run(x), fast.run(x))
