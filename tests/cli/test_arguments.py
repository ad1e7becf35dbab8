"""MODEL, example inputs, DATA and strategy options in every form, and what is said about the forms that are none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.export import Dim, export
from transformers import BertConfig, BertForSequenceClassification

from tests.cli.shell import MODEL, call, found

SHAPE = ("--input", "x=float32[4,1,8,8]")
MORE = """
net = build()
number = 3
import torch
pair = (torch.randn(4, 1, 8, 8),)
named = {"x": torch.randn(4, 1, 8, 8)}
def example(): return pair
def needs(x): return x
def fails(): raise RuntimeError("no weights here")
def head(site):
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(site.classes))
class Head(nn.Module):
    def __init__(self, site):
        super().__init__()
        self.out = nn.Linear(site.width, site.classes)
    def forward(self, h):
        return self.out(h.mean((2, 3)))
def few_classes(site):
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(site.width, 3))
empty = []
batches = [(torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 9]))] * 2
beyond = [(torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 10]))]
other = [(torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3]))]
triples = [(1, 2, 3)]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("user")
    (place / "mynet.py").write_text(MODEL + MORE)
    (place / "broken.py").write_text("import torch\n\nx = 1 / 0\n")
    (place / "package").mkdir()
    (place / "package" / "__init__.py").write_text("")
    (place / "package" / "inner.py").write_text(MODEL)
    return place


@pytest.mark.parametrize("attr", ["build", "Net", "net"])
def test_a_function_a_class_and_a_module_of_a_file(folder: Path, attr: str) -> None:
    assert len(found("inspect", f"{folder}/mynet.py:{attr}", *SHAPE)["exits"]) == 3


def test_a_module_of_a_package_in_the_present_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.path", list(__import__("sys").path))
    assert found("inspect", "package.inner:build", *SHAPE)["model"] == "Net"


@pytest.mark.parametrize(
    "example",
    [
        ("--input", "float32[4, 1, 8, 8]"),
        ("--example", "FOLDER/mynet.py:pair"),
        ("--example", "FOLDER/mynet.py:named"),
        ("--example", "FOLDER/mynet.py:example"),
        ("--data", "digits"),
        ("--data", "FOLDER/mynet.py:batches"),
    ],
)
def test_every_form_of_example(folder: Path, example: tuple[str, str]) -> None:
    flag, value = example
    report = found("inspect", f"{folder}/mynet.py:build", flag, value.replace("FOLDER", str(folder)))
    assert report["inputs"] == ["x: float32[batch, 1, 8, 8]"]


def test_a_directory_of_transformers_needs_no_example(tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=24, num_labels=3,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(tmp_path / "bert")
    out = str(tmp_path / "fast")
    made = found("rewrite", str(tmp_path / "bert"), "--strategy", "mebert", "--criterion", "patience", "-o", out)
    assert made["model"] == "BertForSequenceClassification"
    assert made["exits"][0]["criterion"]["name"] == "patience"
    ran = found("run", out, "--input", "input_ids=int64[2,10]<50", "--input", "attention_mask=int64[2,10]=1")
    assert len(ran["exit_index"]) == 2
    settings = json.loads((tmp_path / "bert" / "config.json").read_text())
    (tmp_path / "bert" / "config.json").write_text(json.dumps(settings | {"architectures": ["MyBert"]}))
    assert "architectures: ['MyBert']" in call("inspect", str(tmp_path / "bert"), code=2).stderr
    (tmp_path / "bert" / "config.json").write_text("{")
    assert "transformers cannot load this" in call("inspect", str(tmp_path / "bert"), code=2).stderr


def test_a_file_of_torch_export(folder: Path, tmp_path: Path) -> None:
    scope: dict[str, object] = {}
    exec(MODEL, scope)
    program = export(
        scope["build"](),  # type: ignore[operator]
        (torch.randn(4, 1, 8, 8),),
        dynamic_shapes=({0: Dim("batch", min=1, max=64)},),
        strict=False,
    )
    torch.export.save(program, tmp_path / "net.pt2")
    assert len(found("inspect", str(tmp_path / "net.pt2"))["exits"]) == 3
    (tmp_path / "none.pt2").write_text("text")
    assert "not a program of torch.export" in call("inspect", str(tmp_path / "none.pt2"), code=2).stderr


def test_options_of_the_strategy(folder: Path) -> None:
    options = ("--option", "threshold=[0.5, 0.7]", "--option", "max-head-share=0.9", "--exits", "2")
    report = found("inspect", f"{folder}/mynet.py:build", *SHAPE, *options)
    assert report["strategy"]["threshold"] == [0.5, 0.7]
    assert [e["open"] for e in report["exits"]] == [False, False]  # until they are trained
    assert report["strategy"]["max_head_share"] == 0.9
    report = found("inspect", f"{folder}/mynet.py:build", *SHAPE, "--head", f"{folder}/mynet.py:Head")
    assert {e["head"] for e in report["exits"]} == {"Head"}


@pytest.mark.parametrize(
    ("args", "said"),
    [
        # what is no model
        (("inspect", "nowhere"), ["does not name a model", "no such file or directory", "package.module:attr"]),
        (("inspect", "FOLDER"), ["no model in this directory", "mynet.py", "config.json"]),
        (("inspect", "FOLDER/mynet.py"), ["does not name a model", "a file, but not one of a model", "file.py:attr"]),
        (("inspect", "FOLDER/nowhere.py:net"), ["no such file", "nowhere.py"]),
        (("inspect", "FOLDER/mynet.py:buidl"), ["there is no 'buidl'", "did you mean build"]),
        (("inspect", "FOLDER/mynet.py:zzz"), ["there is no 'zzz'", "Head, Net"]),
        (("inspect", "FOLDER/mynet.py:number"), ["this is no model", "int", "torch.nn.Module"]),
        (("inspect", "FOLDER/mynet.py:needs"), ["calling this to get a model failed", "needs none"]),
        (("inspect", "FOLDER/mynet.py:fails"), ["calling this to get a model failed", "no weights here", "mynet.py:"]),
        (("inspect", "FOLDER/broken.py:net"), ["importing this failed", "ZeroDivisionError", "broken.py:3"]),
        (("inspect", "no_such_package.inner:net"), ["there is no such module", "no_such_package"]),
        (("inspect", "nowhere.pt2"), ["no such file", "torch.export.save"]),
        # what is no example
        (("inspect", "MODEL"), ["an example input is needed", "arguments x", "--input name=float32"]),
        (("inspect", "MODEL", "--input", "x=float32[1,1,8,8]"), ["a batch of 1", "at least 2 different rows"]),
        (("inspect", "MODEL", "--input", "x=float[4]"), ["unknown dtype", "did you mean float"]),
        (("inspect", "MODEL", "--input", "x:4,1,8,8"), ["not understood", "x=float32[4,3,32,32]"]),
        (("inspect", "MODEL", "--input", "x=int64[4,8]"), ["random integers need a bound", "<1000"]),
        (("inspect", "MODEL", "--input", "x=float32[4]<3"), ["only integers have a bound"]),
        (("inspect", "MODEL", "--input", "x=float32[4]", "--input", "x=float32[4]"), ["given twice"]),
        (("inspect", "MODEL", "--input", "y=float32[4,1,8,8]"), ["no such argument", "got:    y"]),
        (("inspect", "MODEL", "--input", "x=float32[4,8]"), ["itself fails on the example", "x: [4, 8]"]),
        (("inspect", "MODEL", *SHAPE, "--data", "digits"), ["two example inputs", "--input and --data"]),
        (("inspect", "MODEL", "--example", "FOLDER/mynet.py:number"), ["no example input"]),
        (("run", "SAVED"), ["no input was given", "x: float32[batch, 1, 8, 8]", "--data digits:test"]),
        (("run", "SAVED", "--input", "x=float32[4,3,8,8]"), ["does not fit the captured graph", "float32[4, 3, 8, 8]"]),
        (("run", "SAVED", "--data", "digits", "--rows", "0"), ["--rows is a number of at least 1"]),
        (("bench", "SAVED", "--data", "digits", "--batch", "0"), ["--batch is a number of at least 1"]),
        (("bench", "SAVED", "--data", "digits", "--threads", "0"), ["at least one thread"]),
        # what is no strategy
        (("inspect", "MODEL", *SHAPE, "--strategy", "branchi"), ["unknown strategy", "did you mean branchy"]),
        (("inspect", "MODEL", *SHAPE, "--criterion", "entrophy"), ["unknown criterion", "did you mean entropy"]),
        (("inspect", "MODEL", *SHAPE, "--head", "cnov"), ["unknown head", "did you mean conv"]),
        (("inspect", "MODEL", *SHAPE, "--head", "pooler"), ["does not fit the value at this place", "sequence"]),
        (("inspect", "MODEL", *SHAPE, "--head", "FOLDER/mynet.py:few_classes"), ["logits of the wrong size", "[2, 10]"]),
        (("inspect", "MODEL", *SHAPE, "--option", "threshold"), ["key=value"]),
        (("inspect", "MODEL", *SHAPE, "--option", "treshold=1"), ["no such option", "did you mean threshold"]),
        (("inspect", "MODEL", *SHAPE, "--option", "threshold=-1"), ["a threshold is 0 or more"]),
        (("inspect", "MODEL", *SHAPE, "--exits", "0"), ["at least one exit"]),
        (("inspect", "MODEL", *SHAPE, "--exits", "1.5"), ["fractions of the cost between 0 and 1"]),
        (("inspect", "MODEL", *SHAPE, "--exits", "block.1"), ["no cut has this name", "did you mean blocks.1"]),
        (("inspect", "MODEL", *SHAPE, "--exits", "blocks.4"), ["no exit fits where it was asked for", "leaving here saves"]),
        (("inspect", "MODEL", *SHAPE, "--prediction", "logits"), ["names no output", "0: output"]),
        (("inspect", "MODEL", *SHAPE, "--capture", "trace"), ["unknown way to capture", "export"]),
        (("inspect", "MODEL", *SHAPE, "--format", "tre"), ["unknown format", "did you mean tree"]),
        (("run", "SAVED", "--data", "digits", "--executor", "fast"), ["unknown executor", "compact"]),
        (("run", "SAVED", "--data", "digits", *["--threshold", "1"] * 3), ["wrong number of thresholds", "2: exit_0"]),
        (("run", "SAVED", "--data", "digits", "--threshold", "-1"), ["a threshold is a number of 0 or more"]),
        (("run", "SAVED", "--data", "digits", "--threshold", "nan"), ["a threshold is a number of 0 or more"]),
        # what is no data
        (("evaluate", "SAVED", "--data", "digit"), ["unknown data", "did you mean digits"]),
        (("evaluate", "SAVED", "--data", "digits:tset"), ["no such part of the data", "did you mean test"]),
        (("evaluate", "SAVED", "--data", "FOLDER/mynet.py:number"), ["this is no loader", "again and again"]),
        (("evaluate", "SAVED", "--data", "FOLDER/mynet.py:empty"), ["empty"]),
        (("fit", "SAVED", "--data", "FOLDER/mynet.py:empty", "-o", "OUT"), ["empty"]),
        (("calibrate", "SAVED", "--data", "FOLDER/mynet.py:empty", "-o", "OUT"), ["empty"]),
        (("fit", "SAVED", "--data", "FOLDER/mynet.py:beyond", "-o", "OUT"), ["label", "10"]),
        (("evaluate", "SAVED", "--data", "FOLDER/mynet.py:beyond"), ["label", "10"]),
        (("evaluate", "SAVED", "--data", "FOLDER/mynet.py:other"), ["does not fit the captured graph", "[4, 3, 8, 8]"]),
        (("evaluate", "SAVED", "--data", "FOLDER/mynet.py:triples"), ["(inputs, labels)"]),
        (("calibrate", "SAVED", "--data", "digits:val", "--target", "acuracy"), ["did you mean accuracy"]),
        (("calibrate", "SAVED", "--data", "digits:val", "--max-drop", "2"), ["max_drop"]),
        (("calibrate", "SAVED", "--data", "digits:val", "--groups", "clases"), ["labels of groups", "clases"]),
        (("calibrate", "SAVED", "--data", "digits:val", "--static", "FOLDER/mynet.py:number"), ["a model and its cost"]),
        (("calibrate", "SAVED", "--data", "digits:val", "--budget", "1", "--conditional"), ["a budget promises nothing"]),
        # what is no place
        (("evaluate", "nowhere", "--data", "digits"), ["this is no saved program", "no such directory"]),
        (("rewrite", "MODEL", *SHAPE, "-o", "FOLDER"), ["the directory holds something else", "mynet.py"]),
        (("rewrite", "MODEL", *SHAPE, "-o", "FOLDER/mynet.py"), ["there is a file where the program should go"]),
    ],
)
def test_bad_input_is_said_in_words_with_code_2(
    model: str, saved: Path, folder: Path, tmp_path: Path, args: tuple[str, ...], said: list[str]
) -> None:
    names = {"MODEL": model, "SAVED": str(saved), "OUT": str(tmp_path / "out")}
    filled = [names.get(a, a).replace("FOLDER", str(folder)) for a in args]
    done = call(*filled, code=2)
    assert done.stdout == ""
    text = done.stderr
    assert "error: " in text
    assert "Traceback" not in text
    for part in said:
        assert part in text
    assert not (tmp_path / "out").exists()


def test_a_bug_is_told_apart_from_a_mistake(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("eecompile.cli.models.saved", broken)
    done = call("evaluate", str(saved), "--data", "digits:test", code=1)
    assert "unexpected ZeroDivisionError: division by zero" in done.stderr
    assert "run again with --debug" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Traceback" in call("evaluate", str(saved), "--data", "digits:test", "--debug", code=1).stderr


def test_a_port_is_in_range(tmp_path: Path) -> None:
    assert "65535" in call("serve", str(tmp_path), "--port", "99999", code=2).stderr
