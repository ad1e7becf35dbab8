"""Where an exported program is put: a place that is taken is refused before the program is written, and again after."""

from __future__ import annotations

from pathlib import Path

import pytest

from eecompile import ExportError
from eecompile.export.files import placing


def other_files(place: Path) -> None:
    place.mkdir()
    (place / "mine.txt").write_text("mine")


TAKEN = {
    "other files": (other_files, True, "something else in it"),
    "a file for a folder": (lambda place: place.write_text("mine"), True, "is a file"),
    "a folder for a file": (Path.mkdir, False, "is a directory"),
}


@pytest.mark.parametrize("when", ["before", "meanwhile"])
@pytest.mark.parametrize("how", TAKEN)
def test_a_place_that_is_taken(how: str, when: str, tmp_path: Path) -> None:
    take, folder, said = TAKEN[how]
    place, began = tmp_path / "program", []

    def write() -> None:
        with placing(place, folder) as scratch:
            began.append(scratch)
            if folder:
                scratch.mkdir()
            else:
                scratch.write_text("program")
            if when == "meanwhile":
                take(place)

    if when == "before":
        take(place)
    with pytest.raises(ExportError, match=said):
        write()
    assert len(began) == (when == "meanwhile")
    assert list(tmp_path.iterdir()) == [place]
    mine = [p for p in (place, place / "mine.txt") if p.is_file()]
    assert [p.read_text() for p in mine] == ["mine"] * folder
