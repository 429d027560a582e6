"""Data that fails, ends, hangs or is slow: the first two say so, the others are seen."""

import json
import time

import grain
import pytest

from research.data import make_dataset
from research.training import DataError, source
from tests.research.training.test_resume import assert_same, run


class Source:
    """The data of the run, of which batch ``at`` is ``trouble``."""

    def __init__(self, monkeypatch, trouble, at=6, prefetch=0):
        def made(config, *arguments, **options):
            dataset = make_dataset(config, *arguments, **options)
            if options.get("split") == "validation":
                return dataset
            count = iter(range(1, 1000))

            def spoil(batch):
                if next(count) == at:
                    trouble()
                return batch

            dataset = dataset.map(spoil)
            if prefetch:
                dataset = grain.experimental.ThreadPrefetchIterDataset(
                    dataset, prefetch_buffer_size=prefetch
                )
            return dataset

        monkeypatch.setattr("research.training.source.make_dataset", made)


def fail():
    raise OSError(5, "Input/output error", "corpus.txt")


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_source_that_fails_is_named_and_loses_no_step(tmp_path, monkeypatch, prefetch):
    with monkeypatch.context() as patched:
        Source(patched, fail, prefetch=prefetch)
        with pytest.raises(DataError) as caught:
            run(tmp_path / "run")
    message = str(caught.value)
    assert message.startswith("data.source='synthetic': no batch for step 6: OSError: ")
    assert "corpus.txt" in message and "\n" not in message
    if not prefetch:
        steps = []
        run(tmp_path / "run", progress=lambda step, total, metrics: steps.append(step))
        assert steps[0] == 5  # after the last checkpoint
        run(tmp_path / "alone")
        assert_same(tmp_path / "run", tmp_path / "alone")


def test_a_source_that_ends_is_an_error(tmp_path, monkeypatch):
    def made(config, **options):
        if options.get("split") == "validation":
            return make_dataset(config, **options)
        return make_dataset(config, num_epochs=1, **options)

    monkeypatch.setattr("research.training.source.make_dataset", made)
    # 100 examples are 13 batches of 8
    with pytest.raises(DataError, match="^data.source='synthetic': ends before step 14$"):
        run(tmp_path)


@pytest.mark.parametrize("prefetch", [0, 1])
def test_a_source_that_hangs_is_told_and_waited_for(tmp_path, monkeypatch, capsys, prefetch):
    monkeypatch.setattr(source, "STALLED", 0.2)
    Source(monkeypatch, lambda: time.sleep(1.5), prefetch=prefetch)
    run(tmp_path)
    lines = [line for line in capsys.readouterr().err.splitlines() if "no batch" in line]
    assert 3 <= len(lines) <= 8
    for line in lines:
        assert line.startswith("data.source='synthetic': no batch for step 6 after ")
    # and it is seen in the record, as long as it is part of the average
    rows = [json.loads(row) for row in (tmp_path / "timing.jsonl").read_text().splitlines()]
    waits = {row["step"]: row["data_wait"] for row in rows if row["step"] > 1}
    assert all(0 <= wait <= 1 for wait in waits.values())
    assert waits[5] < 0.5 < waits[6]
