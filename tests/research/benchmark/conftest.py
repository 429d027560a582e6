"""Stand-ins: an op ``double`` with peers that work, fail, disagree or are not installed."""

import itertools
import json

import jax.numpy as jnp
import pytest

from pallas_kernels import blocks
from research.benchmark import measure, record, run, tune
from research.benchmark.ops import OPS, Op, Tuning
from research.benchmark.peers import PEERS, Peer, of_jax


@pytest.fixture
def ticks():
    """A clock that goes one second further each time it is read."""
    count = itertools.count()
    return lambda: float(next(count))


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """The op, its folder of results and its table of blocks; no ceiling is measured."""

    def late(arrays, backward):
        calls = itertools.count()

        def fail_in_a_timed_round():
            if next(calls) == 2:
                raise RuntimeError("lost\nmore")

        return measure.Prepared(fail_in_a_timed_round, lambda _: [2 * arrays[0]])

    case = {"n": 8, "dtype": "float32"}
    op = Op(
        "flash_attention",  # any that is there
        lambda c: [jnp.arange(1.0, c["n"] + 1, dtype=c["dtype"])],
        lambda c: 4.0,
        {"cpu": {"small": case, "big": {**case, "n": 16}}},
        2.0,
        tuning={"cpu": Tuning("big", {"query": (1, 2, 512), "key": (512,)})},
    )
    peers = {
        "sum": of_jax(lambda x: x + x),
        "wrong": of_jax(lambda x: x + 2 * x),
        "gone": of_jax(lambda x: x, "else-where", "elsewhere"),
        "broken": of_jax(lambda x: x @ jnp.ones(3)),
        "late": Peer(late),
    }
    monkeypatch.setitem(OPS, "double", op)
    monkeypatch.setitem(PEERS, "double", {"cpu": peers})
    for module in (run, tune):
        monkeypatch.setattr(module, "ours", lambda *_: lambda x: 2 * x)
    ceiling = {"flops_per_second": 100.0, "bytes_per_second": 1e9}
    monkeypatch.setattr(measure, "ceilings", lambda *_: ceiling)
    monkeypatch.setattr(record, "RESULTS", tmp_path / "results")
    table = tmp_path / "blocks.json"
    table.write_text(json.dumps({"cpu": {"query": 512, "key": 512}, "tpu": {"query": 64}}))
    monkeypatch.setattr(blocks, "path", lambda op: table)
    blocks.table.cache_clear()
    yield tmp_path
    blocks.table.cache_clear()
