"""Verdicts on records made up for the purpose."""

import pytest

from research.benchmark import engine, run
from research.benchmark.models import MODELS
from research.benchmark.ops import OPS
from research.benchmark.targets import BOTH, DECODE, FORWARD, TARGETS, judge
from research.benchmark.train import CASES


def row(milliseconds, flops=0.0, moved=0.0):
    median = milliseconds / 1e3
    return {
        "median": median,
        "times": [median],
        "flops_per_second": flops / median,
        "bytes_per_second": moved / median,
    }


def found(op, backend, case, forward, both):
    for rows in (forward, both):
        run.compare(rows)
    cases = {case: {"case": {"dtype": "bfloat16"}, FORWARD: forward, BOTH: both}}
    ceilings = {"bfloat16": {"flops_per_second": 1e15, "bytes_per_second": 1e9}}
    return {"op": op, "machine": {"backend": backend}, "ceilings": ceilings, "cases": cases}


def verdicts(record, platform, case):
    start = f"{platform} {case}"
    return [
        (one["verdict"], one.get("value"), one.get("why"))
        for one in judge(record)
        if one["target"].startswith(start)
    ]


def test_ratios_on_a_cpu():
    record = found(
        "flash_attention",
        "cpu",
        "t4096",
        # naive is faster still, but the target names torch
        {"ours/xla": row(2.0), "torch_sdpa": row(3.0), "naive": row(1.0)},
        {"ours/xla": row(4.0), "torch_sdpa": row(3.0)},
    )
    assert verdicts(record, "cpu", "t4096") == [("met", 1.5, None), ("missed", 0.75, None)]
    assert verdicts(record, "cpu", "t1024") == [("not run", None, "the case was left out")] * 2
    assert verdicts(record, "gpu", "t16384") == [("not run on a GPU", None, None)] * 3


def test_rates_on_a_gpu():
    flops = 1e12
    record = found(
        "flash_attention",
        "gpu",
        "t16384",
        {"ours/gpu": row(1.0, flops), "cudnn": row(1.2), "tokamax": row(0.9)},
        {"ours/gpu": row(6.0, 3.5 * flops), "cudnn": row(6.0)},
    )
    rate, ratio, backward = verdicts(record, "gpu", "t16384")
    assert rate[0] == "met" and rate[1] == pytest.approx(1e15)
    assert ratio[0] == "missed" and ratio[1] == pytest.approx(0.9)  # against the best, tokamax
    assert backward[0] == "met" and backward[1] == pytest.approx(5e14)  # 2.5e12 in 5 ms


def test_bandwidth_and_what_is_absent():
    record = found(
        "selective_scan",
        "gpu",
        "t4096",
        {"ours/gpu": row(1.0)},
        {"ours/gpu": row(2.0, moved=1e6), "jax_linear_attention": {"absent": "skipped: gone"}},
    )
    ratio, bandwidth = verdicts(record, "gpu", "t4096")
    assert ratio == ("not run", None, "no peer was timed")
    assert bandwidth == ("missed", pytest.approx(0.5), None)
    record["cases"]["t4096"][BOTH]["ours/gpu"] = {"absent": "not run: budget"}
    assert {v[2] for v in verdicts(record, "gpu", "t4096")} == {"ours/gpu not run: budget"}


def test_an_engine_beside_what_is_not_run():
    rows = {
        "ours/xla": row(2.0) | {"scheduler": 0.04},
        "transformers": row(5.0),
        "llama.cpp": {"absent": "not run: no export"},
    }
    run.compare(rows)
    record = {
        "op": "engine",
        "machine": {"backend": "cpu"},
        "cases": {"13m_b8": {"case": {}, DECODE: rows}},
    }
    expected = [
        ("met", 2.5, None),
        ("not run", None, "llama.cpp not run: no export"),
        ("met", 0.04, None),
    ]
    assert verdicts(record, "cpu", "13m_b8") == expected
    rows["ours/xla"]["scheduler"] = 0.1
    assert verdicts(record, "cpu", "13m_b8")[2] == ("missed", 0.1, None)


def test_every_target_is_of_a_case_that_is_measured():
    for target in TARGETS:
        whole = {"models": MODELS, "train": CASES, "engine": engine.CASES}
        known = whole.get(target.op) or OPS[target.op].cases[target.platform]
        assert target.case in known
