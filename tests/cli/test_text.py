"""Files of texts and labels as DATA: what becomes of rows, labels and lengths, and what is said where they do not fit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

from eecompile import EecompileError, eecompile, load
from eecompile.cli import data, rows
from eecompile.cli.options import TextOptions
from eecompile.cli.text import KEPT, Takes, Texts
from tests.cli.shell import MODEL, call, found

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "the", "was", "very", ",", "."]
NAMES = {"negative": 0, "positive": 1}


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A local Hugging Face directory: a BERT of 2 classes and at most 24 tokens, with its tokenizer."""
    place = tmp_path_factory.mktemp("hf")
    (place / "words.txt").write_text("\n".join(WORDS))
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=24, id2label={v: k for k, v in NAMES.items()}, label2id=NAMES,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertForSequenceClassification(config).save_pretrained(place / "bert")
    BertTokenizerFast(str(place / "words.txt"), model_max_length=24).save_pretrained(place / "bert")
    return place / "bert"


@pytest.fixture(scope="module")
def fast(bert: Path) -> Any:
    example = {"input_ids": torch.randint(5, 13, (4, 8)), "attention_mask": torch.ones(4, 8, dtype=torch.long)}
    return eecompile(BertForSequenceClassification.from_pretrained(bert).eval(), "mebert", example_kwargs=example)


def texts(bert: Path, takes: Takes | None = None, **options: Any) -> Texts:
    return Texts(TextOptions(**options), takes or Takes(), bert, lambda _: None)


def test_a_file_goes_through_every_command(bert: Path, tmp_path: Path) -> None:
    reviews = [("the film was" + " very" * (i % 9) + (" good" if i % 2 else " bad"), i % 2) for i in range(60)]
    lines = [f'"{text}, .",{"positive" if y else "negative"}' for text, y in reviews]
    (tmp_path / "reviews.csv").write_text("text,label\n" + "\n".join(lines))
    (tmp_path / "reviews.jsonl").write_text("\n".join(json.dumps({"says": t, "stars": y}) for t, y in reviews))
    file, renamed = str(tmp_path / "reviews.csv"), ("--text-column", "says", "--label-column", "stars")
    made, out = str(tmp_path / "made"), str(tmp_path / "fast")
    call("rewrite", str(bert), "--strategy", "mebert", "--exits", "1", "-o", made)
    done = call("fit", made, "--data", file, "--val", file, "-o", out)
    assert "60 rows" in done.stderr
    assert found("calibrate", out, "--data", file, "--max-drop", "0.3", "--no-guarantee")["rows"]
    from_csv = found("evaluate", out, "--data", file)
    from_json = found("evaluate", out, "--data", str(tmp_path / "reviews.jsonl"), *renamed, "--batch-size", "7")
    assert from_csv["samples"] == 60
    assert from_csv["full_accuracy"] == from_json["full_accuracy"]
    assert len(found("run", out, "--data", file, "--rows", "5")["exit_index"]) == 5
    assert found("bench", out, "--data", file, "--batch", "4", "--rounds", "3")["batch"] == 4
    assert {p.name for p in (tmp_path / "fast" / KEPT).iterdir()} >= {"tokenizer.json", "config.json"}
    assert load(out).exits


def test_a_program_of_another_model_leaves_no_tokenizer(bert: Path, tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(MODEL)
    out = str(tmp_path / "program")
    call("rewrite", str(bert), "--strategy", "mebert", "--exits", "1", "-o", out)
    assert (tmp_path / "program" / KEPT).is_dir()
    call("rewrite", f"{tmp_path}/net.py:build", "--input", "x=float32[4,1,8,8]", "-o", out)
    assert not (tmp_path / "program" / KEPT).exists()
    (tmp_path / "r.csv").write_text("text,label\ngood,1\n")
    assert "--tokenizer DIR" in call("evaluate", out, "--data", str(tmp_path / "r.csv"), code=2).stderr


def test_rows_of_a_batch_are_what_each_is_alone(bert: Path, fast: Any, tmp_path: Path) -> None:
    path = tmp_path / "t.tsv"
    said = ["good", "the film was very very bad .", "the film", "very " * 40]
    path.write_text("\ufefftext\tlabel\n" + "".join(f"{t}\t{i % 2}\n" for i, t in enumerate(said)), encoding="utf-8")
    ((inputs, labels),) = texts(bert, Takes.of_program(fast)).loader(path, 4)
    assert list(inputs) == ["input_ids", "attention_mask"]
    assert labels.tolist() == [0, 1, 0, 1]
    assert inputs["attention_mask"].sum(1).tolist() == [3, 9, 4, 24]
    tokenizer = BertTokenizerFast.from_pretrained(bert)
    one = [fast(**tokenizer([t], truncation=True, return_tensors="pt", return_token_type_ids=False)).logits for t in said]
    torch.testing.assert_close(fast(**inputs).logits, torch.cat(one))


def test_only_training_is_shuffled(bert: Path, tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("sentence,class\n" + "".join(f"{'very ' * (i % 5)}bad,{i // 20}\n" for i in range(40)))
    here = texts(bert, max_length=6)
    assert [y.tolist() for _, y in here.loader(path, 20)] == [[0] * 20, [1] * 20]
    (first, second), (again, _) = ([y.tolist() for _, y in here.loader(path, 20, shuffle=True)] for _ in range(2))
    assert sum(first) not in (0, 20) and sum(first) + sum(second) == 20
    assert first == again, "the same in every run"


def test_programs_of_one_length_get_rows_of_it(bert: Path, tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("text,label\ngood,1\n" + "very " * 30 + "bad,0\n")
    names = ["input_ids", "attention_mask"]
    ((inputs, _),) = texts(bert, Takes(names, names, least=10, most=10)).loader(path)
    assert inputs["input_ids"].shape == (2, 10)
    assert inputs["attention_mask"].sum(1).tolist() == [3, 10]


def test_pairs_need_the_argument_that_tells_them_apart(bert: Path, fast: Any, tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("a,b,label\ngood,bad,1\nvery good,very bad,0\n")
    ((inputs, _),) = texts(bert, text_column=["a", "b"]).loader(path)
    assert inputs["token_type_ids"].sum(1).tolist() == [2, 3]
    with pytest.raises(EecompileError, match="compiled without token_type_ids"):
        texts(bert, Takes.of_program(fast), text_column=["a", "b"]).loader(path)
    with pytest.raises(EecompileError, match="compiled without attention_mask"):
        texts(bert, Takes(["input_ids"], ["input_ids"]), text_column=["a", "b"]).loader(path)
    out = str(tmp_path / "pairs")
    asked = ("--text-column", "a", "--text-column", "b")
    call("rewrite", str(bert), "--strategy", "mebert", "--exits", "1", "--data", str(path), *asked, "-o", out)
    assert found("evaluate", out, "--data", str(path), *asked)["samples"] == 2


def test_agreement_needs_no_labels(bert: Path, tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_text(json.dumps([{"text": "good"}, {"text": "bad bad"}]))
    (inputs,) = texts(bert).loader(path, labels=False)
    assert inputs["input_ids"].shape == (2, 4)


@pytest.mark.parametrize(
    ("names", "value", "label"),
    [
        (NAMES, "positive", 1),
        (NAMES, "1", 1),
        (NAMES, 1, 1),
        (NAMES, " 1 ", 1),
        (NAMES, "2", None),
        (NAMES, "Positive", None),
        (NAMES, True, None),
        (NAMES, 1.0, None),
        (NAMES, "", None),
        (NAMES, None, None),
        ({"1": 0, "2": 1}, "2", 1),
        ({"1": 0, "2": 1}, 1, None),  # the number 1, or the class named 1?
        ({"1": 0, "2": 1}, "0", None),
        ({"0": 0, "1": 1}, 1, 1),
    ],
)
def test_labels(bert: Path, tmp_path: Path, names: dict[str, int], value: Any, label: int | None) -> None:
    (tmp_path / "bert").symlink_to(bert)
    place = tmp_path / "with_names"
    place.mkdir()
    for file in bert.iterdir():
        (place / file.name).symlink_to(file)
    settings = json.loads((bert / "config.json").read_text()) | {
        "label2id": names,
        "id2label": {str(v): k for k, v in names.items()},
    }
    (place / "config.json").unlink()
    (place / "config.json").write_text(json.dumps(settings))
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps({"text": "good", "label": value}))
    if label is None:
        with pytest.raises(EecompileError, match="unknown label") as error:
            texts(place).loader(path)
        assert "row 1" in str(error.value) and all(name in str(error.value) for name in names)
    else:
        ((_, labels),) = texts(place).loader(path)
        assert labels.tolist() == [label]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("t.csv", b"", ["no rows"]),
        ("t.csv", b"text,label\n", ["no rows"]),
        ("t.jsonl", b"\n\n", ["no rows"]),
        ("t.json", b"[]", ["no rows"]),
        ("t.csv", "text,label\ncafé,1\n".encode("latin1"), ["not UTF-8", "0xe9", "iconv"]),
        ("t.csv", "text,label\ngood,1\n".encode("utf-16"), ["not UTF-8"]),
        ("t.csv", b"words,label\ngood,1\n", ["which column is the text?", "words, label", "--text-column words"]),
        ("t.csv", b"text,stars\ngood,1\n", ["which column is the label?", "--label-column"]),
        ("t.csv", b"text,text\ngood,1\n", ["two columns", "text, text"]),
        ("t.csv", b"text,label\ngood,1\nso, it is,1\n", ["row 2", "got:    3", "wanted: 2: text, label"]),
        ("t.csv", b"text,label\ngood\n", ["row 1", "got:    1"]),
        ("t.csv", b'text,label\n"good,1\n', ["no table"]),
        ("t.csv", b"text,label\ngood,1\nbad,\n", ["row 2", "unknown label", "negative, positive"]),
        ("t.csv", b"text,label\ngood,1\nbad,positiv\n", ["row 2", "did you mean positive"]),
        ("t.csv", b"text,label\ngood,2\n", ["row 1", "'2'", "0 to 1"]),
        ("t.jsonl", b'{"text": "good", "label": 1}\n{"text": ', ["row 2 (line 2)", "not JSON"]),
        ("t.jsonl", b'{"text": "good", "label": 1}\n3\n', ["row 2", "no object", "int"]),
        ("t.json", b'[{"text": "good"', ["not JSON"]),
        ("t.jsonl", b'{"text": "good", "label": 1}\n{"label": 0}\n', ["row 2", "no text", "nothing"]),
        ("t.jsonl", b'{"text": 3, "label": 1}\n', ["row 1", "int: 3"]),
        ("missing.csv", None, ["cannot be read", "No such file"]),
    ],
)
def test_files_that_do_not_fit(bert: Path, tmp_path: Path, name: str, content: bytes | None, said: Sequence[str]) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(EecompileError) as error:
        texts(bert).loader(path)
    for part in said:
        assert part in str(error.value)
    assert name in str(error.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_length": 25}, "1 to 24 tokens"),
        ({"max_length": 0}, "1 to 24 tokens"),
        ({"text_column": ["txt"]}, "did you mean text"),
        ({"label_column": "lable"}, "did you mean label"),
        ({"text_column": ["text"] * 3}, "one text or a pair"),
        ({"tokenizer": Path("nowhere")}, "no tokenizer in this directory"),
    ],
)
def test_options_that_do_not_fit(bert: Path, tmp_path: Path, options: dict[str, Any], said: str) -> None:
    (tmp_path / "t.csv").write_text("text,label\ngood,1\n")
    with pytest.raises(EecompileError, match=said):
        texts(bert, **options).loader(tmp_path / "t.csv")


def test_a_tokenizer_without_padding_pads_nothing(bert: Path, tmp_path: Path) -> None:
    place = tmp_path / "plain"
    tokenizer = BertTokenizerFast.from_pretrained(bert)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(place)
    (tmp_path / "same.csv").write_text("text,label\ngood,1\nbad,0\n")
    (tmp_path / "mixed.csv").write_text("text,label\ngood,1\nvery bad,0\n")
    assert len(texts(place).loader(tmp_path / "same.csv")) == 1
    with pytest.raises(EecompileError, match="padding token"):
        texts(place).loader(tmp_path / "mixed.csv")


def test_a_broken_tokenizer_is_named(bert: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    (tmp_path / "t.csv").write_text("text,label\ngood,1\n")
    with pytest.raises(EecompileError, match="cannot load this tokenizer"):
        texts(tmp_path).loader(tmp_path / "t.csv")


def test_long_texts_and_many_rows(bert: Path, tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("text,label\n" + f'"{"very " * 40_000}",1\n' + "bad,0\n" * 1500)
    said: list[str] = []
    loader = Texts(TextOptions(), Takes(), bert, said.append).loader(path, 500)
    assert [len(y) for _, y in loader] == [500, 500, 500, 1]
    assert said == [f"{path}: 1501 rows, 24 tokens at most; 1 of them were cut"]


def test_data_names_files(bert: Path, tmp_path: Path) -> None:
    assert {Path(f"x{suffix}").suffix for suffix in rows.FORMATS} == set(rows.FORMATS)
    with pytest.raises(EecompileError, match="does not fit this model"):
        data.loader("reviews.csv")


def test_advice_on_a_directory_and_a_file(bert: Path, tmp_path: Path) -> None:
    lines = [f"the film was{' very' * (i % 9)} {'good' if i % 2 else 'bad'},{i % 2}" for i in range(240)]
    (tmp_path / "reviews.csv").write_text("text,label\n" + "\n".join(lines))
    asked = (str(bert), str(tmp_path / "reviews.csv"), "--minutes", "2", "--only", "mebert", "--batch-size", "16")
    report = found("advise", *asked)
    assert {o["name"].split(" ")[0] for o in report["options"]} == {"mebert", "one"}
    assert report["rows"] == [176, 64] and report["batch"] == 16
    assert all(str(bert) in line for line in report["commands"][:1])
    assert "did you mean mebert" in call("advise", *asked[:2], "--only", "mebret", code=2).stderr
