"""Every Python block of the README and of the pages under docs/ runs as printed, in order, one namespace for each page."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest

from eecompile.errors import UntrainedWarning

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = [p for p in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if BLOCK.search(p.read_text())]
QUICK = {"serving.md", "guarantees.md", "README.md", "inspection.md"}
CASES = [pytest.param(p, id=p.name, marks=() if p.name in QUICK else pytest.mark.nightly) for p in PAGES]


@pytest.mark.parametrize("page", CASES)
def test_code_of_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = page.read_text()
    namespace: dict[str, object] = {"__name__": page.stem}
    for found in BLOCK.finditer(text):
        line = text[: found.start(1)].count("\n")
        code = compile("\n" * line + found.group(1), str(page), "exec")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UntrainedWarning)
            exec(code, namespace)
