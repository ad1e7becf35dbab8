"""Help, completion and colours: what a newcomer sees first."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from eecompile import criteria, heads, inspect, strategies
from eecompile.advice.measure import AGAINST, PROBED
from eecompile.capture import FRONT_ENDS
from eecompile.cli import names
from eecompile.cli.app import app
from eecompile.export import TARGETS
from eecompile.runtime import engine
from tests.cli.shell import ROOT, call, environment, process
from tests.support import nightly

COMMANDS = (
    "advise",
    "rewrite",
    "inspect",
    "fit",
    "calibrate",
    "evaluate",
    "run",
    "bench",
    "export",
    "strategies",
    "doctor",
    "demo",
)
WIDE = {"COLUMNS": "200", "TERMINAL_WIDTH": "200"}


def parameters(command: str) -> set[str]:
    found = get_command(app).commands[command]  # type: ignore[attr-defined]
    return {o for p in found.params for o in (*p.opts, *p.secondary_opts)} | {"--help", "-h"}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples_that_can_be_typed(command: str) -> None:
    text = call(command, "--help", env=WIDE).stdout
    assert text == call(command, "-h", env=WIDE).stdout
    examples = re.findall(r"^ *(eecompile .*)$", text.partition("Examples:")[2], re.MULTILINE)
    assert examples, "no example"
    assert "Examples:" in text
    for line in examples:
        words = shlex.split(line.strip().partition(" | ")[0])
        assert words[1] == command
        used = {w for w in words[2:] if w.startswith("-") and w != "-"}
        assert used <= parameters(command), line


def test_the_first_page() -> None:
    text = call("--help", env=WIDE).stdout
    assert all(f" {c} " in text for c in COMMANDS)
    ways = re.findall(r"eecompile (\w+) ", text.partition("A model from end to end:")[2])
    assert ways[:4] == ["rewrite", "fit", "calibrate", "evaluate"]
    assert "No model at hand: eecompile demo" in text
    assert "rewrite" in call(code=2).output, "no command: the same page"
    assert re.fullmatch(r"eecompile \d+\.\d+\.\d+\n", call("--version").stdout)


@pytest.mark.parametrize("width", ["60", "80", "200"])
def test_examples_stand_in_lines_of_their_own(width: str) -> None:
    text = call("strategies", "--help", env={"COLUMNS": width, "TERMINAL_WIDTH": width}).stdout
    lines = [line.strip() for line in text.splitlines()]
    at = lines.index("Examples:")
    assert [x for x in lines[at + 1 :] if x] == ["eecompile strategies", "eecompile strategies --json"]


def test_a_wrong_command_or_option_names_near_ones() -> None:
    assert "inspect" in call("inspct", code=2).stderr
    assert "--exits" in call("rewrite", "x", "-o", "y", "--exit", "3", code=2).stderr
    assert "--output" in call("rewrite", "x", code=2).stderr
    assert "--epochs" in call("fit", "x", "--data", "digits", "--epochs", "many", code=2).stderr


def test_help_and_completion_need_no_torch() -> None:
    code = (
        "import sys; sys.argv = ['eecompile', *sys.argv[1:]]\nfrom eecompile.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'networkx', 'accelerate', 'sympy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    for args in (["--help"], ["rewrite", "--help"], ["--version"]):
        done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, env=environment())
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("eecompile re", {"report", "rewrite"}),
        nightly("eecompile inspect x --format m", {"mermaid"}),
        nightly("eecompile rewrite x --criterion p", {"patience"}),
        nightly("eecompile fit x --data digits:t", {"digits:train", "digits:test"}),
        ("eecompile inspect x --after find", {"find_blocks", "find_cuts", "find_regions", "find_token_parts"}),
    ],
)
def test_completion(typed: str, offered: set[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from eecompile.cli import main; main()"],
        capture_output=True,
        text=True,
        env=environment(_EECOMPILE_COMPLETE="complete_bash", COMP_WORDS=typed, COMP_CWORD=str(typed.count(" "))),
    )
    assert set(done.stdout.split()) == offered, done.stderr


def test_the_script_for_a_shell() -> None:
    # Which shell is running is found from the parent processes, and a test may have none among them.
    done = process("--show-completion", "bash", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert "_EECOMPILE_COMPLETE=complete_bash" in done.stdout


def test_names_for_completion_are_those_of_the_code() -> None:
    assert set(names.STRATEGIES) == set(strategies.STRATEGIES)
    assert set(names.HEADS) == {*heads.HEADS, "auto", "shared"}
    assert set(names.CRITERIA) == set(criteria.CRITERIA)
    assert set(names.FORMATS) == set(inspect.FORMATS)
    assert names.EXECUTORS == engine.EXECUTORS
    assert names.BACKENDS == engine.BACKENDS
    assert names.CAPTURES == FRONT_ENDS
    assert set(names.RUNTIMES) == set(TARGETS)
    assert set(names.ADVISED) == {*PROBED, *AGAINST}


def test_errors_are_red_on_a_terminal_only(tmp_path: Path) -> None:
    done = call("inspect", str(tmp_path / "nowhere"), code=2, env={"FORCE_COLOR": "1"})
    assert done.stdout == ""
    assert "\x1b[31m" in done.stderr
    assert "error: " in done.stderr
    assert "Traceback" not in done.stderr
    assert "\x1b" not in call("inspect", str(tmp_path / "nowhere"), code=2).stderr
    plain = call("inspect", str(tmp_path / "nowhere"), code=2, env={"FORCE_COLOR": "1", "NO_COLOR": "1"}).stderr
    assert "\x1b[3" not in plain and "error: " in plain
    debug = call("inspect", str(tmp_path / "nowhere"), "--debug", code=2).stderr
    assert "Traceback (most recent call last)" in debug
    assert str(ROOT / "eecompile") in debug
