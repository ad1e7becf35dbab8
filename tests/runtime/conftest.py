"""One BERT for all tests of device programs in a file."""

from __future__ import annotations

import pytest

from eecompile import strategies
from tests.support import compiled as eecompile
from tests.zoo import ZOO


@pytest.fixture(scope="module")
def bert():
    entry = ZOO["bert"]
    args, kwargs = entry.inputs(6)
    return eecompile(entry.model(), strategies.Branchy(exits=3), example_inputs=args, example_kwargs=kwargs)
