"""Targets for the speed of operations and models, fixed before any run, and their verdicts."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from research.benchmark.ops import IMPLEMENTATIONS

FORWARD, BOTH = "forward", "forward+backward"
PASSES = (FORWARD, BOTH)
STEP = "training step"  # of a whole model
DECODE = "decoding"  # by an engine

REFERENCE = "ours/reference"
BELOW = ("overhead", "scheduler")  # the measures of which less is better


class Target(NamedTuple):
    """Ours must reach at least ``bound`` of ``measure``, on ``platform`` in ``case``.

    Measures: ``ratio``, times as fast as ``against`` (a name, or None for the best peer);
    ``flops``, FLOP/s; ``backward flops``, FLOP/s of the backward pass, in the time of forward and
    backward minus that of forward; ``bandwidth``, bytes/s over the machine's peak rate;
    ``overhead``, time over that of ``against``, and ``scheduler``, the part of an engine's time in
    which it does not wait for the device: these must be *below* ``bound``.
    """

    op: str
    platform: str
    case: str
    passes: str
    measure: str
    bound: float
    against: str | None = None

    def __str__(self):
        what = {
            "ratio": f"{self.bound:g}x {self.against or 'the best peer'}",
            "flops": f"{self.bound / 1e12:g} TFLOP/s",
            "backward flops": f"{self.bound / 1e12:g} TFLOP/s in the backward pass alone",
            "bandwidth": f"{self.bound:.0%} of the bandwidth of a copy",
            "overhead": f"{self.bound:g}x the time of {self.against}",
            "scheduler": f"{self.bound:.0%} of the time for the scheduler",
        }[self.measure]
        side = "below" if self.measure in BELOW else "at least"
        return f"{self.platform} {self.case}, {self.passes}: {side} {what}"

    def met(self, value: float) -> bool:
        return value < self.bound if self.measure in BELOW else value >= self.bound


# the GPU's rates are for an H200
TARGETS = (
    *(
        Target("flash_attention", "cpu", case, which, "ratio", 1.0, "torch_sdpa")
        for case in ("t1024", "t4096", "t16384")
        for which in PASSES
    ),
    Target("flash_attention", "gpu", "t16384", FORWARD, "flops", 600e12),
    Target("flash_attention", "gpu", "t16384", FORWARD, "ratio", 1.0),
    Target("flash_attention", "gpu", "t16384", BOTH, "backward flops", 450e12),
    Target("paged_attention", "gpu", "b32_s8192", FORWARD, "ratio", 1.0, "jax_paged"),
    Target("paged_attention", "gpu", "b32_s8192", FORWARD, "bandwidth", 0.8),
    Target("paged_attention", "gpu", "b32_s8192_int8", FORWARD, "ratio", 1.6, "without codes"),
    Target("selective_scan", "cpu", "t2048", FORWARD, "ratio", 3.0, REFERENCE),
    Target("selective_scan", "cpu", "t2048", BOTH, "ratio", 3.0, REFERENCE),
    Target("selective_scan", "gpu", "t4096", BOTH, "ratio", 1.0),
    Target("selective_scan", "gpu", "t4096", BOTH, "bandwidth", 0.6),
    *(
        Target("models", "cpu", model, STEP, "ratio", least, "transformers")
        for model, least in (
            ("llama", 1.0), ("qwen3", 1.0), ("gpt2", 1.0), ("mixtral", 1.0), ("mamba", 3.0),
            ("mamba2", 3.0), ("rwkv4", 3.0),
        )
    ),
    *(Target("train", "cpu", case, STEP, "ratio", 1.0) for case in ("width256", "width512")),
    Target("train", "cpu", "loop", STEP, "overhead", 1.02, "bare step"),
    *(
        target
        for case, least in (("13m_b1", 3.0), ("50m_b1", 3.0), ("13m_b8", 2.0), ("50m_b8", 2.0))
        for target in (
            Target("engine", "cpu", case, DECODE, "ratio", least, "transformers"),
            Target("engine", "cpu", case, DECODE, "ratio", 0.8, "llama.cpp"),
            Target("engine", "cpu", case, DECODE, "scheduler", 0.1),
        )
    ),
    Target("engine", "cpu", "trace", DECODE, "ratio", 1.4, "static batches"),
)  # fmt: skip


def passes(found: Mapping[str, Any]) -> Sequence[str]:
    """The passes that were timed in each of the record's cases."""
    return found.get("passes", PASSES)


def judge(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each target of the record's op with its verdict: met, missed, or not run with ``why``."""
    return [
        {"target": str(target), **_verdict(target, found)}
        for target in TARGETS
        if target.op == found["op"]
    ]


def _verdict(target: Target, record: Mapping[str, Any]) -> dict[str, Any]:
    if target.platform != record["machine"]["backend"]:
        article = "a GPU" if target.platform == "gpu" else f"a {target.platform.upper()}"
        return {"verdict": f"not run on {article}"}
    if target.case not in record["cases"]:
        return {"verdict": "not run", "why": "the case was left out"}
    value = _value(target, record)
    if isinstance(value, str):
        return {"verdict": "not run", "why": value}
    return {"verdict": "met" if target.met(value) else "missed", "value": value}


def _value(target: Target, record: Mapping[str, Any]) -> float | str:
    """The value of the target's measure, or the reason why there is none."""
    case, name = record["cases"][target.case], f"ours/{IMPLEMENTATIONS[target.platform][0]}"
    rows = case[target.passes]
    row = rows.get(name, {"absent": "left out"})
    if "absent" in row:
        return f"{name} {row['absent']}"
    if target.measure == "flops":
        return row["flops_per_second"]
    if target.measure == "scheduler":
        return row["scheduler"]
    if target.measure == "bandwidth":
        ceiling = record["ceilings"][case["case"]["dtype"]]["bytes_per_second"]
        return row["bytes_per_second"] / ceiling
    if target.measure == "backward flops":
        forward = case[FORWARD].get(name, {"absent": "left out"})
        if "absent" in forward:
            return f"{name}, forward, {forward['absent']}"
        flops = [r["flops_per_second"] * r["median"] for r in (row, forward)]
        return (flops[0] - flops[1]) / (row["median"] - forward["median"])
    peer = target.against or row["best_peer"]
    if peer is None:
        return "no peer was timed"
    if peer not in row["times_as_fast_as"]:
        return f"{peer} {rows.get(peer, {'absent': 'left out'})['absent']}"
    ratio = row["times_as_fast_as"][peer]["ratio"]
    return 1 / ratio if target.measure == "overhead" else ratio
