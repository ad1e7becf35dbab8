"""What must be carried to a machine without a network: `python -m tests.gpu.carry --there NAMES.txt --to FOLDER`.

`NAMES.txt` lists the packages that the machine has, one a line. What the proof needs and the machine lacks is downloaded as
wheels for its Python, without its needs, and must stay under 64 MiB. Where nothing is missing, nothing is made.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:  # in the standard library from 3.11 on; pip brings one along
    from pip._vendor import tomli as tomllib

ROOT = Path(__file__).parents[2]
MOST = 64 << 20
EXTRAS = ("hf", "demo", "dev")
NOT_NEEDED = {"build", "mypy", "ruff", "eecompile"}  # of those extras: nothing is built or linted there
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def needed() -> set[str]:
    """Packages that the package, its tests and its benchmark import, by pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(r for extra in EXTRAS for r in project["optional-dependencies"][extra])]
    names = {plain(re.split(r"[\s\[<>=!~;]", r, maxsplit=1)[0]) for r in wanted}
    return (names | {"cuda-bindings"}) - NOT_NEEDED


def missing(there: set[str]) -> list[str]:
    return sorted(needed() - {plain(name) for name in there})


def download(names: Sequence[str], to: Path, python: str) -> list[str]:
    """The command that gets the wheels, of the versions that are installed here where they are."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--python-version", python]
    command += ["--implementation", "cp", *(word for p in PLATFORMS for word in ("--platform", p)), "-d", str(to)]
    return command + [pinned(name) for name in names]


def pinned(name: str) -> str:
    try:
        return f"{name}=={version(name)}"
    except ModuleNotFoundError:
        return name


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.carry", description=__doc__)
    parser.add_argument("--there", type=Path, required=True, help="packages of the machine, one a line")
    parser.add_argument("--to", type=Path, required=True, help="folder for the wheels")
    parser.add_argument("--python", default="3.12", help="of the machine (3.12)")
    options = parser.parse_args(argv)
    names = missing(set(options.there.read_text().split()))
    if not names:
        print("nothing is missing there; the proof is: python3 -m tests.gpu")
        return 0
    print(f"missing there: {', '.join(names)}")
    subprocess.run(download(names, options.to, options.python), check=True)
    size = sum(p.stat().st_size for p in options.to.glob("*.whl"))
    if size > MOST:
        print(f"error: {size >> 20} MiB of wheels, and {MOST >> 20} may be carried", file=sys.stderr)
        return 1
    site = ".site"
    print(f"{size / 2**20:.1f} MiB. The proof is:")
    print(f"python3 -m pip install -q --no-index --no-deps --target {site} {options.to}/*.whl")
    print(f"PYTHONPATH={site} python3 -m tests.gpu")
    return 0


if __name__ == "__main__":
    sys.exit(main())
