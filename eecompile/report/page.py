"""The page itself: one self-contained HTML file."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.resources import files
from io import StringIO
from pathlib import Path
from typing import Any

from eecompile.calibration.guarantee import said
from eecompile.errors import EecompileError, MissingDependencyError, check_name
from eecompile.plain import as_path
from eecompile.report.figures import PLOTS
from eecompile.report.gather import Example, Gathered, frontier, gather
from eecompile.training.workers import main_only
from eecompile.writing import write_whole

KINDS = tuple(PLOTS)


def plot(fast: Any, kind: str, loader: Iterable[Any]) -> Any:
    """One plot of the page as a `matplotlib.figure.Figure`.

    Args:
        kind: "accuracy", "classes", "difficulty", "latency" or "reliability".
        loader: Yields `(inputs, labels)`.

    Raises:
        EecompileError: An unknown kind, or data that a report cannot show.
        MissingDependencyError: matplotlib is not installed.
    """
    check_name("plot", kind, KINDS)
    return PLOTS[kind][1](gather(fast, loader))


def report(fast: Any, path: str | Path, loader: Iterable[Any]) -> Path:
    """Writes one self-contained page about the module on this data, and returns its path.

    Of several processes, which all call this, the first writes and measures times.

    Args:
        path: The HTML file; replaced as a whole where it exists.
        loader: Yields `(inputs, labels)`.

    Raises:
        EecompileError: No exits, no labels, outputs that are no class scores, or a path that cannot be written.
        MissingDependencyError: matplotlib or jinja2 is not installed.
    """
    try:
        import jinja2
    except ImportError as e:
        raise MissingDependencyError("the page needs jinja2", hint="pip install 'eecompile[report]'") from e
    path = as_path("path", path)
    if not path.parent.is_dir():
        raise EecompileError("the report cannot be written", where=str(path), got=f"no directory {path.parent}")
    found = gather(fast, loader)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(files("eecompile.report").joinpath("page.html").read_text(encoding="utf-8"))
    text = template.render(
        title=fast.title,
        verdict=verdict(found),
        guarantee=said(fast) or "",
        evaluation=found.evaluation,
        plots=[(title, _svg(draw(found))) for title, draw in PLOTS.values()],
        program=str(fast.explain()),
        examples=[("Left early and right", _shown(found.early_right)), ("Left early and wrong", _shown(found.early_wrong))],
        rows=found.evaluation.rows,
    )
    main_only(lambda: _write(path, text))
    return path


def _write(path: Path, text: str) -> None:
    try:
        write_whole(path, text)
    except OSError as e:
        raise EecompileError("the report cannot be written", where=str(path), got=str(e)) from e


def verdict(found: Gathered) -> tuple[bool, str]:
    """Whether early exit beats a random choice of exits at the same cost, and the sentence that says so."""
    e = found.evaluation
    assert e.accuracy is not None and e.full_accuracy is not None
    points = [(r.cost, r.accuracy_if_all) for r in e.rows if r.accuracy_if_all is not None]
    by_chance = frontier([*points, (1.0, e.full_accuracy)], e.mean_cost)
    now = f"accuracy {e.accuracy:.2%} against {e.full_accuracy:.2%} of the full model, at {e.mean_cost:.1%} of its cost"
    if e.mean_cost >= 1:
        return False, f"Early exit does not pay here: {now}. Nothing is saved."
    if by_chance is not None and by_chance >= e.accuracy:
        simpler = f"A choice of exits that does not look at the row, at no more cost, has {by_chance:.2%}"
        return False, f"Choosing an exit for each row does not pay here: {now}. {simpler}."
    if by_chance is None:
        return True, f"Early exit pays: {now}."
    return True, f"Early exit pays: {now}. A random choice of exits of the same cost has {by_chance:.2%}."


def _svg(figure: Any) -> str:
    """A figure without ground, its black in the page's colour of text: readable in the light and in the dark."""
    text = StringIO()
    figure.savefig(text, format="svg", transparent=True)
    made = text.getvalue()
    return made[made.index("<svg") :].replace("#000000", "currentColor")


def _shown(examples: list[Example]) -> list[dict[str, Any]]:
    return [{**vars(e), "picture": None if e.image is None else _picture(e)} for e in examples]


def _picture(example: Example) -> str:
    """An image as SVG squares: small inputs stay readable and the page has no other files."""
    image = example.image
    assert image is not None
    step = max(1, max(image.shape[-2:]) // 32)
    image = image[..., ::step, ::step]
    squares = []
    for y in range(image.shape[-2]):
        for x in range(image.shape[-1]):
            value = image[..., y, x].mul(255).long()
            r, g, b = [int(value)] * 3 if image.ndim == 2 else [int(v) for v in value]
            squares.append(f'<rect x="{x}" y="{y}" width="1.05" height="1.05" fill="#{r:02x}{g:02x}{b:02x}"/>')
    return f'<svg viewBox="0 0 {image.shape[-1]} {image.shape[-2]}" class="picture">{"".join(squares)}</svg>'
