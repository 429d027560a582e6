"""Our inference engine compared with transformers' ``generate``, and with static batches of ours.

``13m_b1`` … ``50m_b8``: greedy generation by a Llama of that many parameters for 1 or 8 prompts,
float32, all cores: `TOKENS` new tokens after `PROMPT` ones. Ours is `research.inference.engine`,
with a slot for each prompt; theirs is ``generate`` with its dynamic cache, in eager PyTorch. Both
have the same weights, and their tokens must agree. The time includes that of the short prompts.
A row of ours also has ``scheduler``: the part of the engine's steps in which it did not wait for
the device, median over all runs.

``trace``: requests with lognormal lengths in 8 slots, by the engine, and by
`research.inference.generate` in groups of 8, which wait for the longest of each.

llama.cpp is a peer that is not run: nothing here writes its files.
"""

import dataclasses
import importlib
import importlib.util
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from layers.decoder import Decoder
from layers.outputs_first import for_decoding
from research.benchmark import measure, step
from research.benchmark.models import (
    PACKAGES,
    THEIRS,
    Model,
    our_model,
    parameters_of,
    their_weights,
)
from research.benchmark.run import machine_record
from research.benchmark.step import OURS
from research.benchmark.targets import DECODE, judge
from research.inference import SamplingConfig, generate
from research.inference.engine import Engine, EngineConfig, Request
from research.inference.trace import Lengths, draw_trace
from research.training.flops import forward_flops_per_token

NAME = "engine"
STATIC, LLAMA_CPP = "static batches", "llama.cpp"
PROMPT, TOKENS, VOCAB = 16, 96, 1024
SLOTS, REQUESTS = 8, 48
TRACE = "trace"


@dataclasses.dataclass(frozen=True)
class Size:
    """A Llama, and how many prompts it continues at once."""

    width: int
    layers: int
    batch: int

    @property
    def model(self) -> Model:
        """Its description for transformers."""
        fields = dict(
            vocab_size=VOCAB, hidden_size=self.width, num_hidden_layers=self.layers,
            intermediate_size=8 * self.width // 3, num_attention_heads=max(1, self.width // 64),
            max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=None,
            eos_token_id=None, pad_token_id=None,
        )  # fmt: skip
        return Model("Llama", "llama", fields)


CASES = {
    "13m_b1": Size(512, 4, 1),
    "13m_b8": Size(512, 4, 8),
    "50m_b1": Size(1024, 4, 1),
    "50m_b8": Size(1024, 4, 8),
    TRACE: Size(512, 4, SLOTS),
}


def chosen(names: Sequence[str] | None) -> list[str]:
    """``names`` of `CASES`, checked by `step.choose`."""
    return step.choose(names, CASES)


def bench(
    names: Sequence[str], *, rounds: int, seconds: float, budget: measure.Budget
) -> dict[str, Any]:
    """Each of ``names`` of `CASES`, as one JSON-ready record."""
    machine = machine_record(PACKAGES)  # includes the load before the measurements
    installed = all(importlib.util.find_spec(name) is not None for name in PACKAGES)
    ceilings = {"float32": measure.ceilings("float32", rounds, seconds)}
    measured = {}
    for name in names:
        deadline, size = budget.share(), CASES[name]
        beside = installed and name != TRACE
        with their_weights(size.model, beside) as (theirs, directory):
            model = our_model(size.model, directory)
            of_case = _trace if name == TRACE else _decode
            measured[name] = of_case(size, model, theirs, rounds, seconds, deadline, budget.clock)
        if not installed and name != TRACE:
            reason = f"skipped: {' and '.join(PACKAGES)} not installed"
            measured[name][DECODE][THEIRS] = {"absent": reason}
    result = {"op": NAME, "passes": [DECODE], "machine": machine}
    result |= {"ceilings": ceilings, "cases": measured}
    return result | {"targets": judge(result)}


def _case(size: Size, model: Decoder, tokens: int) -> dict[str, Any]:
    return {
        "width": size.width, "layers": size.layers, "batch": size.batch, "tokens": tokens,
        "vocab": VOCAB, "parameters": parameters_of(model), "dtype": "float32",
    }  # fmt: skip


def _decode(
    size: Size, model: Decoder, theirs: Any, rounds, seconds, deadline, clock
) -> dict[str, Any]:
    random = np.random.default_rng(0)
    prompts = random.integers(0, VOCAB, (size.batch, PROMPT))
    engine = _engine(model, size.batch, PROMPT + TOKENS, chunk=PROMPT)
    requests = [Request(prompt.tolist(), _greedy(TOKENS)) for prompt in prompts]
    shares: list[float] = []
    prepared = {OURS: _prepared(lambda: _run(engine, requests, shares))}
    if theirs is not None:
        prepared[THEIRS] = _prepared(_their_generate(theirs, prompts))
    flops = forward_flops_per_token(model, PROMPT + TOKENS, cached=True) * size.batch * TOKENS
    rows = step.rows(prepared, flops, rounds, seconds, deadline, clock)
    for row in rows.values():
        if "absent" not in row:
            row["tokens_per_second"] = size.batch * TOKENS / row["median"]
    if "absent" not in rows[OURS]:
        rows[OURS]["scheduler"] = statistics.median(shares)
    rows[LLAMA_CPP] = {"absent": "not run: there is no export to GGUF"}
    return {"case": _case(size, model, TOKENS), DECODE: rows}


def _trace(
    size: Size, model: Decoder, theirs: Any, rounds, seconds, deadline, clock
) -> dict[str, Any]:
    # `generate` compiles for the longest of each group: few different lengths
    new = Lengths(mean=3.8, spread=0.8, most=256, multiple=32)
    works = draw_trace(REQUESTS, Lengths(np.log(PROMPT).item(), 0.0, most=PROMPT), new, seed=0)
    random = np.random.default_rng(1)
    prompts = [random.integers(0, VOCAB, work.prompt).tolist() for work in works]
    requests = [Request(p, _greedy(w.new)) for p, w in zip(prompts, works, strict=True)]
    model = for_decoding(model)  # not in each call of `generate`
    engine = _engine(model, size.batch, PROMPT + new.most, chunk=PROMPT)

    def static() -> list[list[int]]:
        tokens = []
        for start in range(0, REQUESTS, size.batch):
            group = slice(start, start + size.batch)
            longest = max(work.new for work in works[group])
            rows = generate(model, prompts[group], _greedy(longest))
            tokens += [row[: w.new] for row, w in zip(rows, works[group], strict=True)]
        return tokens

    shares: list[float] = []
    runs = {OURS: lambda: _run(engine, requests, shares), STATIC: static}
    prepared = {who: _prepared(run) for who, run in runs.items()}
    total = sum(work.new for work in works)
    flops = forward_flops_per_token(model, PROMPT + new.most // 4, cached=True) * total
    rows = step.rows(prepared, flops, rounds, seconds, deadline, clock)
    for row in rows.values():
        if "absent" not in row:
            row["tokens_per_second"] = total / row["median"]
    return {"case": _case(size, model, total), DECODE: rows}


def _greedy(new: int) -> SamplingConfig:
    return SamplingConfig(max_new_tokens=new, temperature=0.0)


def _engine(model: Decoder, slots: int, length: int, chunk: int) -> Engine:
    engine = Engine(model, EngineConfig(slots=slots, max_length=length, chunk=chunk))
    engine.warm_up()
    return engine


def _run(engine: Engine, requests: Sequence[Request], shares: list[float]) -> list[list[int]]:
    """The tokens of each request; the scheduler's share of the steps is added to ``shares``."""
    before = engine.stats.seconds, engine.waited
    results = engine.run(requests)
    spent, waited = engine.stats.seconds - before[0], engine.waited - before[1]
    shares.append(1 - waited / spent)
    return [result.tokens for result in results]


def _prepared(run: Callable[[], list[list[int]]]) -> measure.Prepared:
    """``run``, whose result is the tokens of each row."""

    def values(rows: list[list[int]]) -> list[np.ndarray]:
        # different tokens are as far apart as they can be: an id is no number
        return [np.eye(VOCAB, dtype=np.float32)[row] for row in rows]

    return measure.Prepared(run, values)


def _their_generate(model: Any, prompts: np.ndarray) -> Callable[[], list[list[int]]]:
    torch = importlib.import_module("torch")
    model = model.eval()
    ids = torch.tensor(prompts, dtype=torch.long)
    options: Mapping[str, Any] = dict(
        attention_mask=torch.ones_like(ids), do_sample=False, use_cache=True,
        max_new_tokens=TOKENS, min_new_tokens=TOKENS,
    )  # fmt: skip

    def run() -> list[list[int]]:
        with torch.inference_mode():
            return model.generate(ids, **options)[:, ids.shape[1] :].tolist()

    return run
