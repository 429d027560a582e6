"""A run goes on only with the data that it was begun with; until its first step it may change."""

import dataclasses
import json
import os
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from layers.config import ConfigError
from research.data import DataConfig, SyntheticConfig, dataset, tokenizers, train_bpe
from research.models.companions import family_name
from research.parallel import MeshConfig
from research.training import TrainingConfig, loop, train
from research.training.workdir import begin, data_record, record_changed_data
from tests.research.training.test_resume import MODEL, quiet
from tests.research.training.test_source import OnPolicy

RUN = Path("run")  # in the folder of the test
TRAINING = TrainingConfig(steps=4, eval_every=2, eval_batches=1, checkpoint_every=2, log_every=1)


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """The working directory, with files for training and validation and a tokenizer."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d").mkdir()
    for name in ("a.txt", "b.txt", "held.md"):
        (tmp_path / "d" / name).write_text(f"the text of {name}")
    train_bpe(["the text of"], 270, "tokenizer.json")
    return tmp_path


FILES = DataConfig(
    source="files", paths=("d/*.txt",), validation_paths=("d/*.md",), tokenizer="tokenizer.json"
)


def start(data, *, accept=False, training=TRAINING):
    parts = dict(model=MODEL, data=data, training=training, mesh=MeshConfig(), objective=None)
    return begin(RUN, parts, 0, lead=True, accept_changed_data=accept)


def begun(data):
    """A run that has its first metrics."""
    assert start(data) == []
    (RUN / "metrics.jsonl").write_text('{"step": 1}\n')
    assert start(data) == []


def assert_refused_until_accepted(data, *phrases):
    with pytest.raises(ConfigError, match="^data.source=.*must be as when workdir 'run'") as error:
        start(data)
    message = str(error.value)
    assert "\n" not in message
    for phrase in phrases:
        assert phrase in message
    before = data_record(RUN)[1]
    changed = start(data, accept=True)
    assert data_record(RUN)[1] == before  # recorded when the step is known
    record_changed_data(RUN, data, 7, changed)
    history = data_record(RUN)[1]["history"]
    assert [(entry["step"], entry["changes"]) for entry in history] == [(7, changed)]
    assert history[0]["before"] == {k: before.get(k) for k in ("sha256", "tokenizer_sha256")}
    assert start(data) == []
    return changed


def rewrite(name, text):
    Path("d", name).write_text(text)


CHANGES = {
    "appended": (lambda: rewrite("a.txt", "the text of a.txt, more"), "a.txt: 17 bytes, sha256 "),
    "shortened": (lambda: rewrite("a.txt", "the"), " then, 3 bytes, sha256 "),
    "rewritten": (lambda: rewrite("a.txt", "the text of A.txt"), "a.txt: 17 bytes, sha256 "),
    "validation": (lambda: rewrite("held.md", "more"), "held.md: 19 bytes"),
    "removed": (lambda: os.remove("d/a.txt"), "then, absent now"),
    "added": (lambda: rewrite("c.txt", "more"), "c.txt: absent then, 4 bytes"),
    "order": (lambda: os.rename("d/a.txt", "d/c.txt"), "the order of the files"),
    "other split": (lambda: os.rename("d/b.txt", "d/b.md"), "b.txt: 17 bytes"),
    "tokenizer": (
        lambda: train_bpe(["other text"], 270, "tokenizer.json"),
        "tokenizer 'tokenizer.json': sha256 ",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_the_files_is_named(name, corpus):
    begun(FILES)
    change, phrase = CHANGES[name]
    change()
    assert len(assert_refused_until_accepted(FILES, phrase)) == 1 + (name == "other split")
    kept = RUN / "hugging_face" / "tokenizer.json"  # generation reads it
    assert kept.read_bytes() == Path("tokenizer.json").read_bytes()


def test_another_name_or_folder_is_no_change(corpus):
    begun(FILES)
    os.rename("d/b.txt", "d/bb.txt")
    os.utime("d/a.txt")
    assert start(FILES) == []


def test_many_changes_are_counted(corpus, monkeypatch):
    for number in range(9):
        rewrite(f"{number}.txt", f"{number}")
    begun(FILES)
    for number in range(9):
        rewrite(f"{number}.txt", f"{number} more")
    assert assert_refused_until_accepted(FILES, "3.txt: ", "and 5 more")[-1] == "and 5 more"
    monkeypatch.setattr(dataset, "_LISTED", 3)
    record_changed_data(RUN, FILES, 8, [])
    assert "parts" not in data_record(RUN)[1]
    rewrite("a.txt", "")
    with pytest.raises(ConfigError, match="content: 107 bytes, sha256 .* then, 90 bytes, sha256 "):
        start(FILES)


def test_other_tokens_of_the_same_files_are_named(corpus, monkeypatch):
    begun(FILES)
    dataset._load.cache_clear()
    # as another version of the library
    monkeypatch.setattr(
        tokenizers.JsonTokenizer,
        "encode_documents",
        lambda self, documents: [np.array([5, 6], np.uint16) for _ in documents],
    )
    assert_refused_until_accepted(FILES, "tokens: {'train': ")
    dataset._load.cache_clear()


def test_another_standard_library_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for version in ("3.11.1", "3.12.2"):
        (tmp_path / version).mkdir()
        (tmp_path / version / "abc.py").write_text(f"VERSION = {version!r}")
    data = DataConfig()

    def use(version, folder):
        dataset._load.cache_clear()
        monkeypatch.setattr("platform.python_version", lambda: version)
        monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path / folder))

    use("3.11.1", "3.11.1")
    begun(data)
    use("3.11.4", "3.11.1")  # the same files
    assert start(data) == []
    use("3.12.2", "3.12.2")
    assert_refused_until_accepted(data, "Python 3.11.1: 18 bytes, ", "Python 3.12.2: absent then, ")
    dataset._load.cache_clear()


def test_another_dataset_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def use(*texts):
        dataset._load.cache_clear()
        rows = types.SimpleNamespace(
            column_names=["text"], select_columns=lambda name: [{"text": text} for text in texts]
        )
        load = types.SimpleNamespace(load_dataset=lambda *_, **__: rows)
        monkeypatch.setitem(sys.modules, "datasets", load)

    data = DataConfig(source="hf", paths=("owner/name",))
    use("one", "two")
    begun(data)
    use("one", "too")
    assert_refused_until_accepted(data, "owner/name: 6 bytes, sha256 ")
    use("too", "one")
    assert len(start(data, accept=True)) == 1
    dataset._load.cache_clear()


def test_another_task_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = DataConfig(source="synthetic", synthetic=SyntheticConfig("copy", 16), sequence_length=9)
    begun(data)
    generate = dataset.generate
    # as another version of the generator
    monkeypatch.setattr(dataset, "generate", lambda task, key, *rest: generate(task, (9,), *rest))
    assert_refused_until_accepted(data, "task 'copy': sha256 ")


def test_records_that_changed_are_named(tmp_path, monkeypatch):
    module = pytest.importorskip("array_record.python.array_record_module")
    monkeypatch.chdir(tmp_path)

    def write(*texts):
        writer = module.ArrayRecordWriter("a.array_record", "group_size:1")
        for text in texts:
            writer.write(text)
        writer.close()

    data = DataConfig(source="files", paths=("a.array_record",))
    write(b"one", b"two")
    begun(data)
    write(b"one", b"two", b"three")
    assert_refused_until_accepted(data, "a.array_record: 6 bytes, ", "then, 11 bytes, ")


def test_a_run_without_its_record_of_the_data_is_refused(corpus):
    begun(FILES)
    (RUN / "data.json").unlink()
    with pytest.raises(ConfigError, match="data.json, which describes the data, is missing"):
        start(FILES)


@pytest.mark.parametrize(
    "content, fault",
    [
        ("{", "not JSON: "),
        ("[]", "the content must be "),
        ("{}", "sha256 is missing; delete it"),
        ('{"sha256": "0", "bytes": "9"}', "bytes must be int; delete it"),
        ('{"sha256": "0", "parts": [{"name": "a.txt"}]}', r"parts\[0\].split is missing"),
        ('{"sha256": "0", "history": [{"step": 1}]}', r"history\[0\].changes is missing"),
    ],
)
def test_a_damaged_record_of_the_data_is_named(content, fault, corpus):
    begun(FILES)
    (RUN / "data.json").write_text(content)
    for read in (lambda: start(FILES, accept=True), lambda: data_record(RUN)):
        with pytest.raises(ConfigError, match=f"^file='run/data.json': {fault}"):
            read()
    (RUN / "data.json").unlink()
    record_changed_data(RUN, FILES, 1, start(FILES, accept=True))
    assert start(FILES) == []


@pytest.mark.parametrize("trace", ["metrics.jsonl", "checkpoints/2", "unreadable/2"])
def test_a_start_that_did_nothing_is_begun_again(trace, corpus):
    begin_again = dataclasses.replace(TRAINING, steps=9)
    start(FILES)
    (RUN / "checkpoints").mkdir()
    (RUN / "metrics.jsonl").touch()
    rewrite("a.txt", "more")
    assert start(FILES, training=begin_again) == []
    config = json.loads((RUN / "config.json").read_text())
    _, data = data_record(RUN)
    assert config["training"]["steps"] == 9 and data["parts"][0]["bytes"] == 4
    path = RUN / trace
    if path.suffix:
        path.write_text("{}\n")
    else:
        path.mkdir(parents=True)
    with pytest.raises(ConfigError, match="training.steps=4: workdir 'run' was begun with 9"):
        start(FILES)


def test_a_start_that_did_nothing_leaves_no_tokenizer_and_no_family(corpus):
    Path("chat_template.jinja").write_text("{{ messages }}")
    Path("config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    origin = RUN / "hugging_face"
    start(FILES)
    kept = dataclasses.replace(FILES, tokenizer=str(origin / "tokenizer.json"))
    for data in (FILES, kept):  # the tokenizer may be that of the workdir itself
        start(data)
        assert (origin / "chat_template.jinja").exists() and family_name(origin) == "llama"
    start(dataclasses.replace(FILES, tokenizer="byte"))
    assert (origin / "tokenizer.json").exists()
    assert not (origin / "chat_template.jinja").exists() and family_name(origin) is None


def test_a_folder_that_is_no_run_keeps_its_config(corpus):
    RUN.mkdir()
    (RUN / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match="workdir 'run' was begun with"):
        start(FILES)


def test_a_run_goes_on_with_data_that_was_accepted(corpus):
    data = DataConfig(
        source="files", paths=("d/*.txt",), validation_paths=("d/*.md",), sequence_length=8
    )
    model = dataclasses.replace(MODEL, vocab_size=258)

    def run(**options):
        steps = []
        progress = lambda step, *_: steps.append(step)  # noqa: E731
        train(model, data, TRAINING, workdir="run", **{"progress": progress, **options})
        return steps

    def stop(step, *_):
        if step == 3:
            raise OSError("stop")

    with pytest.raises(OSError, match="stop"):
        run(progress=stop)
    rewrite("a.txt", "the text of a.txt, more")
    with pytest.raises(ConfigError, match="a.txt: 17 bytes, .* then, 23 bytes"):
        run()
    assert run(accept_changed_data=True) == [3, 4]
    _, record = data_record(RUN)
    assert [entry["step"] for entry in record["history"]] == [2]
    assert run() == []


def test_a_split_without_documents_is_refused_before_anything(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in "123":
        (tmp_path / f"d{name}.txt").write_text(f"document {name}")
    data = DataConfig(source="files", paths=("d?.txt",), sequence_length=8)
    model = dataclasses.replace(MODEL, vocab_size=258)
    monkeypatch.setattr(loop, "make_step", lambda *_, **__: pytest.fail("compiled"))
    with pytest.raises(ConfigError, match="validation_fraction=0.05: leaves none of 3 documents"):
        train(model, data, TRAINING, workdir="run", progress=quiet)
    assert not RUN.exists()
    data = dataclasses.replace(data, validation_fraction=0.9999)
    with pytest.raises(ConfigError, match="leaves none of 3 documents for train"):
        train(model, data, TRAINING, workdir="run", progress=quiet)


def test_a_flag_that_nothing_reads_is_refused():
    message = "accept_changed_data=True: requires data and a workdir"
    data = DataConfig(source="synthetic", synthetic=SyntheticConfig("copy", 64))
    with pytest.raises(ConfigError, match=message):
        train(MODEL, data, TRAINING, accept_changed_data=True)
    training = dataclasses.replace(TRAINING, eval_batches=0)
    with pytest.raises(ConfigError, match=message):
        train(MODEL, None, training, source=OnPolicy(), workdir="run", accept_changed_data=True)
