"""One BERT for all tests of device programs in a file."""

from __future__ import annotations

import pytest

from eecompile import strategies
from tests.support import again


@pytest.fixture(scope="module")
def bert(zoo):
    return again(zoo("bert").fast, strategies.Branchy(exits=3))
