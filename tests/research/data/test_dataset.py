"""Batches: resume, processes, epochs, splits, the record."""

import json

import numpy as np
import pytest

from layers.config import ConfigError, from_mapping
from research.data import DataConfig, SyntheticConfig, fingerprint, make_dataset, vocabulary_size

FIELDS = {"tokens", "targets", "positions", "segment_ids", "weights"}
RECALL = SyntheticConfig("associative_recall", 32, {"pairs": 3})


@pytest.fixture(scope="module")
def jsonl(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "a.jsonl"
    rng = np.random.default_rng(0)
    lines = [
        json.dumps({"text": "".join(map(chr, rng.integers(97, 123, rng.integers(1, 90))))})
        for _ in range(200)
    ]
    path.write_text("\n".join(lines))
    return str(path)


def configs(jsonl, **options):
    small = {"sequence_length": 32, "batch_size": 4} | options
    files = {"source": "files", "paths": (jsonl,), "validation_fraction": 0.2}
    return {
        "concat": DataConfig(**files, **small),
        "first_fit": DataConfig(**files, **small, packing="first_fit", packing_bins=6),
        "prefetch": DataConfig(**files, **small, packing="first_fit", prefetch=2),
        "synthetic": DataConfig(source="synthetic", synthetic=RECALL, **small),
        "finite": DataConfig(
            source="synthetic",
            **small,
            synthetic=SyntheticConfig("copy", 16, {}, examples=21, validation_examples=10),
        ),
    }


KINDS = ("concat", "first_fit", "prefetch", "synthetic", "finite")


def assert_equal(a, b):
    assert set(a) == set(b) == FIELDS
    for name in a:
        assert a[name].dtype == b[name].dtype
        np.testing.assert_array_equal(a[name], b[name])


@pytest.mark.parametrize("kind", KINDS)
def test_resume_is_bit_identical_anywhere(kind, jsonl):
    config = configs(jsonl)[kind]
    iterator = iter(make_dataset(config, seed=3))
    states, made = [], []
    for _ in range(120):  # several epochs of every kind
        states.append(json.dumps(iterator.get_state()))
        made.append(next(iterator))
    assert max(map(len, states)) < 200
    fresh = iter(make_dataset(config, seed=3))
    for point in (0, 1, 7, 40, 64, 113):
        for target in (iterator, fresh):  # backwards on a used iterator, and on a new one
            target.set_state(json.loads(states[point]))
            assert json.dumps(target.get_state()) == states[point]
            for expected in made[point : point + 7]:
                assert_equal(next(target), expected)


@pytest.mark.parametrize("packing", ["concat", "first_fit"])
def test_validation_resumes_to_its_end(packing, jsonl):
    config = configs(jsonl)[packing]
    whole = list(make_dataset(config, "validation"))
    for point in range(len(whole) + 1):
        iterator = iter(make_dataset(config, "validation"))
        for _ in range(point):
            next(iterator)
        again = iter(make_dataset(config, "validation"))
        again.set_state(json.loads(json.dumps(iterator.get_state())))
        rest = list(again)
        assert len(rest) == len(whole) - point
        for a, b in zip(rest, whole[point:], strict=True):
            assert_equal(a, b)


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("kind", KINDS)
def test_processes_share_the_batch_of_one(kind, split, jsonl):
    config = configs(jsonl)[kind]
    one = iter(make_dataset(config, split, seed=5))
    several = [iter(make_dataset(config, split, 5, p, 4)) for p in range(4)]
    steps = 0
    for batch in one:
        shares = [next(s) for s in several]
        assert all(len(s["tokens"]) == 1 for s in shares)
        assert_equal(batch, {k: np.concatenate([s[k] for s in shares]) for k in FIELDS})
        steps += 1
        if steps == 70:
            break
    else:
        for share in several:
            assert next(share, None) is None
    assert steps > 1


@pytest.mark.parametrize("kind", KINDS)
def test_seed_and_epoch_change_the_order(kind, jsonl):
    config = configs(jsonl)[kind]

    def first(seed, count=4):
        iterator = iter(make_dataset(config, seed=seed))
        return np.stack([next(iterator)["tokens"] for _ in range(count)])

    np.testing.assert_array_equal(first(1), first(1))
    assert (first(1) != first(2)).any()


def test_one_seed_is_not_another_an_epoch_later(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"document {i}"}) for i in range(60)))
    config = DataConfig(source="files", paths=(str(path),), sequence_length=16, batch_size=1)
    epoch = len(list(make_dataset(config, num_epochs=1)))
    one = [b["tokens"] for b in make_dataset(config, seed=1, num_epochs=2)][epoch:]
    other = [b["tokens"] for b in make_dataset(config, seed=2, num_epochs=1)]
    assert len(one) == len(other) > 30
    assert any((a != b).any() for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_restores_onto_another_number_of_processes(kind, jsonl):
    config = configs(jsonl)[kind]
    one = iter(make_dataset(config, seed=5))
    for _ in range(9):
        next(one)
    state = json.dumps(one.get_state())
    for process in range(2):
        half = iter(make_dataset(config, "train", 5, process, 2))
        half.set_state(json.loads(state))
        one.set_state(json.loads(state))
        for _ in range(5):
            rows = slice(2 * process, 2 * process + 2)
            assert_equal(next(half), {k: v[rows] for k, v in next(one).items()})


def test_epochs_are_shuffled_differently(jsonl):
    config = configs(jsonl)["finite"]
    batches = list(make_dataset(config, num_epochs=2))
    rows = np.concatenate([b["tokens"][b["weights"].any(1)] for b in batches])
    one, two = rows[:21], rows[21:]
    assert len(two) == 21 and (one != two).any()
    assert sorted(map(bytes, one)) == sorted(map(bytes, two))


@pytest.mark.parametrize("kind", KINDS)
def test_validation_is_finite_and_the_same_for_every_seed(kind, jsonl):
    config = configs(jsonl)[kind]
    a, b = (list(make_dataset(config, "validation", seed=s)) for s in (0, 9))
    assert 0 < len(a) == len(b) < 200
    for x, y in zip(a, b, strict=True):
        assert_equal(x, y)
        assert x["tokens"].shape == (4, 32)


def test_last_batch_is_filled_with_padding(jsonl):
    for kind, rows in (("finite", 10), ("concat", None)):
        last = list(make_dataset(configs(jsonl)[kind], "validation"))[-1]
        padding = ~last["weights"].any(1)
        if rows:
            assert padding.sum() == -rows % 4
        assert not last["segment_ids"][padding].any()
        assert (last["positions"][padding] == -1).all()


def test_synthetic_splits_do_not_meet(jsonl):
    config = configs(jsonl)["synthetic"]
    train, validation = (
        {bytes(r) for _ in range(30) for r in next(it)["tokens"]}
        for it in (iter(make_dataset(config, s)) for s in ("train", "validation"))
    )
    assert len(train) == 120 and not train & validation


def test_synthetic_row_is_shifted_by_one(jsonl):
    batch = next(iter(make_dataset(configs(jsonl)["synthetic"])))
    np.testing.assert_array_equal(batch["tokens"][:, 1:], batch["targets"][:, :-1])
    assert (batch["weights"].sum(1) == 1).all() and (batch["weights"][:, -1] == 1).all()


def test_stdlib_is_there_and_in_the_record():
    config = DataConfig(sequence_length=128, batch_size=2)
    batch = next(iter(make_dataset(config)))
    assert batch["tokens"].shape == (2, 128) and batch["tokens"].max() < vocabulary_size(config)
    record = fingerprint(config)
    assert json.loads(json.dumps(record)) == record
    assert record["files"] > 300 and record["bytes"] > 3_000_000 and len(record["sha256"]) == 64
    held = record["documents"]["validation"] / sum(record["documents"].values())
    assert 0.01 < held < 0.12
    specials = sum(record["documents"].values())
    assert sum(record["tokens"].values()) == record["bytes"] + specials


def test_fingerprint_follows_content_not_place(tmp_path):
    records = []
    for folder, text in (("a", "one\ntwo"), ("b", "one\ntwo"), ("c", "one\ntoo")):
        (tmp_path / folder).mkdir()
        path = tmp_path / folder / "x.txt"
        path.write_text(text)
        records.append(fingerprint(DataConfig(source="files", paths=(str(path),))))
    assert records[0] == records[1] != records[2]
    path.write_text("one\ntwo")  # a rewritten file is read again
    assert fingerprint(DataConfig(source="files", paths=(str(path),))) == records[0]


def test_fingerprint_of_a_task_follows_its_parameters():
    def record(**parameters):
        task = SyntheticConfig("associative_recall", 32, parameters)
        return fingerprint(DataConfig(source="synthetic", synthetic=task))

    assert record() == record()
    assert record()["sha256"] != record(distance=9)["sha256"]
    assert json.dumps(record(distance=9))


def test_config_from_a_mapping_names_the_path():
    config = from_mapping(
        DataConfig, {"source": "synthetic", "synthetic": {"task": "copy", "vocab_size": 8}}, "data"
    )
    assert config.synthetic.vocab_size == 8
    with pytest.raises(ConfigError, match=r"data\.synthetic\.parameters\.distance=999: .*\[1, "):
        from_mapping(
            DataConfig,
            {
                "source": "synthetic",
                "synthetic": {"task": "associative_recall", "parameters": {"distance": 999}},
            },
            "data",
        )


@pytest.mark.parametrize(
    "options, message",
    [
        ({"sequence_length": 1}, "sequence_length=1: must be at least 2"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"source": "stdlb"}, "source='stdlb': .*did you mean 'stdlib'"),
        ({"packing": "best"}, "packing='best'"),
        ({"packing_bins": 0}, "packing_bins=0"),
        ({"prefetch": -1}, "prefetch=-1"),
        ({"validation_fraction": 1.0}, r"validation_fraction=1.0: must be in \[0, 1\)"),
        ({"source": "files"}, r"paths=\(\): "),
        ({"source": "files", "paths": "a.txt"}, "paths='a.txt': must be a list"),
        ({"source": "hf", "paths": ("a", "b")}, r"paths=\('a', 'b'\): .*exactly one"),
        ({"paths": ("a",)}, "reads no paths"),
        ({"validation_paths": ("a",)}, "validation_paths=.*only source='files'"),
        ({"text_field": ""}, "text_field=''"),
        ({"text_field": "body"}, "text_field='body': source='stdlib' does not read it"),
        ({"document_separator": "--"}, "document_separator='--': source='stdlib' does not"),
        ({"hf_subset": "en"}, "hf_subset='en': source='stdlib' does not read it"),
        ({"source": "files", "paths": ("a",), "hf_split": "x"}, "hf_split='x': source='files'"),
    ],
)
def test_config_errors(options, message):
    with pytest.raises(ConfigError, match=message) as error:
        DataConfig(**options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"process_count": 3}, "batch_size=4: must be divisible by process_count 3"),
        ({"process_index": 2, "process_count": 2}, r"process_index=2: must be in \[0, 2\)"),
        ({"process_count": 0}, "process_count=0"),
        ({"split": "test"}, "split='test': must be one of train, validation"),
        ({"seed": -1}, "seed=-1"),
        ({"num_epochs": 0}, "num_epochs=0"),
        ({"num_epochs": 1}, "num_epochs=1: must be None while synthetic.examples is None"),
    ],
)
def test_argument_errors(arguments, message, jsonl):
    with pytest.raises(ConfigError, match=message):
        make_dataset(configs(jsonl)["synthetic"], **arguments)


@pytest.mark.parametrize("fraction, split", [(0.0, "validation"), (0.999999, "train")])
def test_an_empty_split_is_refused(fraction, split, tmp_path):
    path = tmp_path / "one.txt"
    path.write_text("only")
    config = DataConfig(source="files", paths=(str(path),), validation_fraction=fraction)
    with pytest.raises(ConfigError, match=f"validation_fraction=.* 1 documents for {split}"):
        make_dataset(config, split)
