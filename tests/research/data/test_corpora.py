"""Reading documents: formats, the split, and what is refused."""

import dataclasses
import importlib.util
import itertools
import json
import os
import sys
import types

import pytest

from layers.config import ConfigError
from research.data import DataConfig, fingerprint, make_dataset, read_corpus


def files(*paths, **options):
    return DataConfig(source="files", paths=tuple(map(str, paths)), **options)


def refuse(config, message):
    with pytest.raises(ConfigError, match=message) as error:
        read_corpus(config)
    assert "\n" not in str(error.value)


def documents(config):
    corpus = read_corpus(config)
    return sorted(corpus.train + corpus.validation)


def test_text_files_by_glob_and_separator(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.txt").write_text("one<end>two<end>")
    (tmp_path / "deep" / "b.txt").write_text("three")
    assert documents(files(tmp_path / "**/*.txt")) == [b"one<end>two<end>", b"three"]
    separated = files(tmp_path / "*.txt", tmp_path / "a.txt", document_separator="<end>")
    assert documents(separated) == [b"one", b"two"]  # a file named twice is read once


def test_a_name_that_looks_like_a_glob_is_a_file(tmp_path):
    path = tmp_path / "a[1].txt"
    path.write_text("x")
    assert documents(files(path)) == [b"x"]


def test_jsonl(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [{"body": "one\u2028line"}, {"body": ""}, {"body": "två"}]
    path.write_text("\n\n".join(json.dumps(r, ensure_ascii=False) for r in rows), "utf-8")
    assert documents(files(path, text_field="body")) == sorted(
        ["one\u2028line".encode(), "två".encode()]
    )


def test_array_record(tmp_path):
    module = pytest.importorskip("array_record.python.array_record_module")
    path = tmp_path / "a.array_record"
    writer = module.ArrayRecordWriter(str(path), "group_size:1")
    texts = [f"document {i}".encode() for i in range(2100)]
    for text in texts:
        writer.write(text)
    writer.close()
    assert documents(files(path)) == sorted(texts)


def test_array_record_missing_or_broken(tmp_path, monkeypatch):
    path = tmp_path / "a.array_record"
    path.write_bytes(b"not records")
    if importlib.util.find_spec("array_record"):
        refuse(files(path), "must be an ArrayRecord file")
    monkeypatch.setitem(sys.modules, "array_record", None)
    refuse(files(path), "ArrayRecord requires `pip install array-record`")


def test_split_is_by_text_whatever_the_order(tmp_path):
    lines = [json.dumps({"text": f"document {i}"}) for i in range(300)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "b.jsonl").write_text("\n".join(lines[::-1] + lines))
    a, b = (
        read_corpus(files(tmp_path / n, validation_fraction=0.1)) for n in ("a.jsonl", "b.jsonl")
    )
    assert set(a.validation) == set(b.validation) and set(a.train) == set(b.train)
    assert not set(b.train) & set(b.validation)
    assert 15 < len(a.validation) < 45
    assert a.sha256 != b.sha256


def test_validation_by_hand(tmp_path):
    for name in ("train", "held"):
        (tmp_path / f"{name}.txt").write_text(name)
    corpus = read_corpus(
        files(tmp_path / "train.txt", validation_paths=(str(tmp_path / "held.txt"),))
    )
    assert (corpus.train, corpus.validation) == ([b"train"], [b"held"])


def test_stdlib_reads_the_library_only():
    corpus = read_corpus(DataConfig())
    text = corpus.train + corpus.validation
    assert any(b"class JSONDecoder" in d for d in text)
    assert not any(b"def test_main(" in d and b"import test.support" in d for d in text)
    again = read_corpus(DataConfig())
    assert again.sha256 == corpus.sha256 and again.validation == corpus.validation


def test_missing_files_are_refused(tmp_path):
    refuse(files(tmp_path / "no.txt"), r"paths='.*no.txt': no such file")
    refuse(files(tmp_path / "*.txt"), r"paths='.*\*.txt': no such file, and no file matches")
    refuse(files(tmp_path), r"must be a file; for a directory give a glob")
    (tmp_path / "folder").mkdir()
    refuse(files(tmp_path / "fold*"), "matches directories only")
    (tmp_path / "a.txt").write_text("x")
    held = (str(tmp_path / "held.txt"),)
    refuse(files(tmp_path / "a.txt", validation_paths=held), "validation_paths='.*held.txt'")
    os.symlink("gone.txt", tmp_path / "link.txt")
    for name in ("link.txt", "l*.txt"):
        refuse(files(tmp_path / name), "link.txt': is a link to a file that does not exist")
    os.mkfifo(tmp_path / "pipe.txt")
    refuse(files(tmp_path / "p*.txt"), "pipe.txt': must be a file, not a device or a pipe")


def test_unreadable_files_are_refused(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("x")
    with monkeypatch.context() as patch:
        patch.setattr("os.access", lambda *_: False)  # root may read every file
        refuse(files(tmp_path / "a.txt"), "a.txt': must be readable")

    def fail(*_, **__):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("research.data.formats.open", fail, raising=False)
    refuse(files(tmp_path / "a.txt"), r"a.txt': cannot be read \(Input/output error\)")


@pytest.mark.parametrize("again", ["val.txt", "v*.txt", "./val.txt", "../{here}/val.txt", "link"])
def test_a_file_is_read_once_and_for_one_split(again, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "val.txt"):
        (tmp_path / name).write_text(name)
    os.symlink("val.txt", tmp_path / "link")
    again = again.format(here=tmp_path.name)
    assert documents(files("*.txt", again, tmp_path / "val.txt")) == [b"a.txt", b"val.txt"]
    refused = r"^validation_paths='.*(val.txt|link)': must not be read for training too"
    with pytest.raises(ConfigError, match=refused):
        make_dataset(files("*.txt", validation_paths=(again,)))
    refuse(files(again, validation_paths=("*.txt",)), "must not be read for training too")


def test_empty_corpus_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("")
    refuse(files(tmp_path / "a.txt"), "paths=.*must hold a document with text")
    (tmp_path / "a.jsonl").write_text("\n \n")
    refuse(files(tmp_path / "a.jsonl"), "must hold a document with text")


def test_blank_documents_are_dropped(tmp_path):
    (tmp_path / "a.txt").write_text("--one\n--\n \t--two--\n")
    assert documents(files(tmp_path / "a.txt", document_separator="--")) == [b"one\n", b"two"]


def test_fields_that_no_file_uses_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "a.jsonl").write_text('{"text": "one--two"}')
    refuse(files(tmp_path / "a.txt", text_field="body"), "text_field='body': only JSON has fields")
    for name in ("a.txt", "a.jsonl"):
        config = files(tmp_path / name, document_separator="--")
        refuse(config, "document_separator='--': must occur in a plain-text file")


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"text": "x"', r"a.jsonl:2': must be a line of JSON"),
        ("[1]", r"a.jsonl:2': must be a JSON object"),
        ('{"body": "x"}', r"text_field='text': no such field at .*a.jsonl:2; its fields: body"),
        ('{"text": 3}', r"text_field='text': must hold a string, holds int at .*a.jsonl:2"),
        (r'{"text": "\ud800"}', r"text_field='text': not valid Unicode at .*a.jsonl:2"),
    ],
)
def test_bad_jsonl_names_the_line(line, message, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    refuse(files(path), message)


def test_hugging_face_missing_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    refuse(DataConfig(source="hf", paths=("x",)), r"source='hf': requires the `hf` extra")


class _Rows:
    """The part of `datasets.Dataset` that is used."""

    column_names = ["text", "label"]

    def select_columns(self, name):
        return [{name: f"row {i}"} for i in range(3)]


def test_hugging_face_reads_rows(monkeypatch):
    calls = []

    def load_dataset(name, subset, *, split):
        calls.append((name, subset, split))
        if name == "gone":
            raise FileNotFoundError("no\nsuch dataset")
        return _Rows()

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    config = DataConfig(source="hf", paths=("name",), hf_subset="en", hf_split="test")
    assert documents(config) == [b"row 0", b"row 1", b"row 2"]
    assert calls == [("name", "en", "test")]
    batches = make_dataset(dataclasses.replace(config, sequence_length=6, batch_size=1))
    assert {bytes(b["tokens"][0, 1:5].tolist()) for b in itertools.islice(batches, 9)} == {b"row "}
    assert fingerprint(config)["parts"][0]["name"] == "name"
    refuse(DataConfig(source="hf", paths=("gone",)), "paths='gone': cannot load .*no such dataset")
    refuse(
        DataConfig(source="hf", paths=("name",), text_field="body"),
        "text_field='body': no such column in name; columns: text, label",
    )


def test_hugging_face_library_on_disk(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": [f"document {i}" for i in range(5)]})
    rows.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": rows}).save_to_disk(str(tmp_path / "many"))
    (tmp_path / "plain").mkdir()
    rows.to_parquet(str(tmp_path / "plain" / "train.parquet"))
    for name in ("one", "many", "plain"):
        config = DataConfig(source="hf", paths=(str(tmp_path / name),))
        assert len(documents(config)) == 5
        next(iter(make_dataset(config)))
    refuse(DataConfig(source="hf", paths=(str(tmp_path / "many"),), hf_split="dev"), "cannot load")
