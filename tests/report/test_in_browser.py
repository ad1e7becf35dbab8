"""The page in headless Chromium: no errors, every plot drawn, nothing wider than the window, readable in the dark."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from eecompile import CompiledModule
from eecompile.report import KINDS, report

api = pytest.importorskip("playwright.sync_api")
pytest.importorskip("matplotlib")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.nightly, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")]

# In the page: boxes of the plots with the number of their visible marks and the smallest text, and colours of the page.
LOOK = """() => {
  const luminance = colour => {
    const linear = v => v <= 10.3 ? v / 3294.6 : ((v / 255 + .055) / 1.055) ** 2.4;
    const [r, g, b] = colour.match(/[\\d.]+/g).map(linear);
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const plots = [...document.querySelectorAll("figure svg")].map(svg => {
    const box = svg.getBoundingClientRect();
    const marks = [...svg.querySelectorAll("path, use")].filter(m => m.getBoundingClientRect().width > 0);
    const ink = luminance(getComputedStyle(svg.querySelector('g[id^="text_"] use')).fill);
    return {width: box.width, height: box.height, marks: marks.length, ink};
  });
  const body = getComputedStyle(document.body);
  const size = text => parseFloat(getComputedStyle(text).fontSize);
  return {
    plots, wide: document.documentElement.scrollWidth, window: document.documentElement.clientWidth,
    ground: luminance(body.backgroundColor), ink: luminance(body.color),
    texts: [...document.querySelectorAll("p, td, th, h1, h2, figcaption, .row")].map(size),
    cut: [...document.querySelectorAll("p, h1, h2, figcaption, .row")].filter(t => t.scrollWidth > t.clientWidth).length,
  };
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def page(fast: CompiledModule, data: list[tuple[Tensor, Tensor]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return report(fast, tmp_path_factory.mktemp("page") / "report.html", data)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
def test_page_in_a_browser(browser: Any, page: Path, width: int, scheme: str) -> None:
    found: list[str] = []
    tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    tab.on("pageerror", lambda error: found.append(str(error)))
    tab.on("console", lambda message: found.append(message.text))
    tab.on("request", lambda request: found.append(request.url))
    tab.goto(page.as_uri())
    seen = tab.evaluate(LOOK)
    tab.close()
    assert found == [page.as_uri()], "errors, or something that is not in the page"
    assert seen["wide"] <= seen["window"] == width
    assert seen["cut"] == 0
    assert len(seen["plots"]) == len(KINDS)
    columns = 1 if width == 400 else 3
    for plot in seen["plots"]:
        assert plot["width"] > 0.8 * min(width, 1200) / columns and plot["height"] > 0.5 * plot["width"]
        assert plot["marks"] > 20
    assert min(seen["texts"]) >= 13
    assert (seen["ground"] < 0.1) == (scheme == "dark")
    for ink in (seen["ink"], *(plot["ink"] for plot in seen["plots"])):
        light, dark = sorted((seen["ground"], ink), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 7, "contrast"
