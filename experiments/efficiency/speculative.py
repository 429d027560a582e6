"""Speculative decoding: one pass of the model for several tokens (Leviathan 2023, 2211.17192).

A small model drafts γ tokens, and one pass of the target gives its probabilities of all of them. A
drafted token is accepted with probability min(1, p/q), and the first that is not is drawn anew, so
that the law of the output is the target's (appendix A.1). If drafts are accepted at the rate α, a
pass yields (1 − α^(γ+1)) / (1 − α) tokens (equation 1); T5-XXL decodes 2 to 3 times as fast
(abstract). Prompt lookup (Saxena 2023) drafts what followed the last tokens before, without a
model.

Here a target and a smaller draft are trained on the same text. Greedy tokens are
compared one by one with the target's. For the law, 20,480 tokens are sampled after one prompt, by
the target twice and with drafts: the total variation between both is compared with what two samples
of the target have by chance. The rate α_i at position i is measured with γ = 8 and predicts the
tokens of a pass for γ = 2 and 4. Held-out text gives the rate α = E[Σ min(p, q)] of equation 1. For
prompt lookup, prompts hold the same text twice. The wall clock is claimed only where a pass of 5
tokens costs little more than one of 1: at the size of `cpu` it need not.

    ablate run efficiency/speculative --scale=smoke    # a few steps, no findings
    ablate run efficiency/speculative                  # cpu: 2 cores; time in `ablate list`
    ablate run efficiency/speculative --scale=gpu      # one accelerator
    ablate run efficiency/speculative --scale=paper    # the target's training; 64 chips of TPU v5p
"""

import itertools

import jax
import numpy as np

from layers.config import from_mapping
from research.ablation import Arm, Claim, Unit, mean
from research.ablation.language_model import (
    check_unit,
    evaluate_unit,
    language_model,
    load_source,
    train_unit,
)
from research.ablation.measure import pass_cost
from research.ablation.serving import greedy, parted, warm_engine
from research.data import DataConfig, make_dataset
from research.inference import SamplingConfig
from research.inference.acceptance import (
    acceptance,
    expected_tokens,
    overlap,
    total_variation,
    total_variation_by_chance,
)
from research.inference.engine import EngineConfig, Request, Speculative
from research.inference.observe import Observation, observe

PAPER = (
    "Leviathan 2023, Fast Inference from Transformers via Speculative Decoding, arXiv:2211.17192; "
    "Saxena 2023, Prompt Lookup Decoding"
)
CODE = (
    "research/inference/speculative.py",
    "research/inference/ngram.py",
    "research/inference/engine/speculation.py",
    "research/inference/acceptance.py",
)
MATCHED = "target, prompts, seeds and engine; arms differ in what drafts"
SEEDS = (0, 1, 2, 3, 4)
TOPOLOGY = "v5p:4x4x4"  # the slice of paper scale
PAPER_ARMS = ("target", "draft")  # the others train nothing
DRAFTED = (2, 4, 8)
MOST = max(DRAFTED)


def get_config(scale):
    config = language_model(scale)
    smoke, small = scale == "smoke", scale in ("smoke", "cpu")
    width, layers, heads, mlp = (16, 1, 4, 32) if smoke else (128, 2, 2, 344)
    if smoke:
        config.model.num_layers = 1
    if scale == "cpu":
        config.model.update(width=256, num_layers=4)
        config.model.attention.update(num_heads=4, num_kv_heads=4, head_dim=64)
        config.model.mlp.width = 680
        config.training.steps = 360
        config.training.optimizer.update(learning_rate=2e-3, warmup_steps=18)
        config.training.update(eval_every=120, checkpoint_every=120)
    if not small:
        width, layers, heads, mlp = (256, 4, 4, 688) if scale == "gpu" else (1024, 8, 8, 2752)
    config.draft = dict(width=width, layers=layers, heads=heads, mlp=mlp, learning_rate=3e-3)
    config.drafted = 0  # γ; 0: no drafts
    config.ngram = (0, 0)  # the least and the most last tokens that are looked up; zeros: a model
    config.slots, config.prompt = (2, 8) if smoke else (8, 64)
    config.prompts = 4 if smoke else 192  # for the tokens of a pass
    config.new = 18 if smoke else 72
    config.greedy_prompts = 2 if smoke else 48
    config.law = dict(requests=1 if smoke else 80, samples=4 if smoke else 16, new=16)
    config.rounds = 2 if smoke else 20  # of timed passes
    return config


def _draft(name):
    return lambda config: config.draft[name]


ARMS = (
    Arm("target"),
    Arm(
        "draft",
        {
            "model.width": _draft("width"),
            "model.num_layers": _draft("layers"),
            "model.attention.num_heads": _draft("heads"),
            "model.attention.num_kv_heads": _draft("heads"),
            "model.attention.head_dim": lambda config: config.draft.width // config.draft.heads,
            "model.mlp.width": _draft("mlp"),
            "training.optimizer.learning_rate": _draft("learning_rate"),
        },
    ),
    *(Arm(f"drafts_{count}", {"drafted": count}, after=("target", "draft")) for count in DRAFTED),
    Arm("ngram", {"drafted": 4, "ngram": (2, 5)}, after=("target",)),
)

ACCEPTS = Claim(
    "accepts",
    "The draft's rate of acceptance on held-out text is above 0.6",
    paper="Table 2: 0.75 for T5-small, which gives 3.4 times the speed with γ = 7",
    measure=mean("overlap", "drafts_4"),
    comparison=">",
    margin=0.6,
)
CHEAP = Claim(
    "cheap_passes",
    "A pass of 5 tokens takes less than 1.3 times one of 1 token",
    paper="§3.3: enough compute for passes of several tokens",
    measure=mean("pass_cost", "drafts_4"),
    comparison="<",
    margin=1.3,
)


def _same(arm, what):
    return Claim(
        f"same_{arm}",
        f"With {what}, all greedy tokens are the target's, but for ties",
        paper="appendix A.1: identical outputs",
        measure=mean("untied", arm),
        comparison="<",
        margin=0.0,
        deterministic=True,
    )


def _predicted(count):
    def error(results):
        rates = results.metric(f"drafts_{MOST}", "rates")[:, :count]
        predicted = np.array([expected_tokens(of_seed) for of_seed in rates])
        return results.metric(f"drafts_{count}", "tokens_per_pass") / predicted - 1

    return Claim(
        f"predicted_{count}",
        f"With γ = {count}, a pass yields within 3% of the tokens that the rates by position of "
        f"γ = {MOST} predict",
        paper="§3.1: equation 1 for one rate",
        measure=error,
        comparison="within",
        margin=0.03,
        gate=ACCEPTS,
    )


def _equation_1(results):
    rate = results.metric("drafts_4", "overlap")
    return results.metric("drafts_4", "tokens_per_pass") * (1 - rate) / (1 - rate**5) - 1


CLAIMS = (
    *(_same(f"drafts_{count}", f"γ = {count}") for count in DRAFTED),
    _same("ngram", "prompt lookup"),
    Claim(
        "law",
        "20,480 sampled tokens are less than 1.1 times as far from the target's as 95% of pairs of "
        "samples of the target",
        paper="appendix A.1: the distribution is the target's",
        measure=mean("variation_ratio", "drafts_4"),
        comparison="<",
        margin=1.1,
        gate=ACCEPTS,
    ),
    *map(_predicted, (2, 4)),
    Claim(
        "equation_1",
        "With γ = 4, a pass yields within 10% of the tokens of equation 1 for the rate on held-out "
        "text",
        paper="equation 1, with independent acceptances of one rate",
        measure=_equation_1,
        comparison="within",
        margin=0.1,
        gate=ACCEPTS,
    ),
    Claim(
        "passes",
        "With γ = 4, the target computes less than half as many passes as tokens",
        paper="abstract: 2 to 3 times as fast",
        measure=mean("passes_per_token", "drafts_4"),
        comparison="<",
        margin=0.5,
        gate=ACCEPTS,
    ),
    Claim(
        "lookup",
        "After prompts that hold a text twice, prompt lookup needs less than 0.7 passes a token",
        paper="Saxena 2023: 2 to 4 times as fast where the prompt is copied",
        measure=mean("greedy_passes", "ngram"),
        comparison="<",
        margin=0.7,
    ),
    Claim(
        "speedup",
        "With γ = 4 and one row, tokens come more than 1.2 times as fast",
        paper="abstract: 2 to 3 times as fast",
        measure=mean("speedup", "drafts_4"),
        comparison=">",
        margin=1.2,
        gate=CHEAP,
    ),
)


def check(unit: Unit):
    check_unit(unit)


def run(unit: Unit):
    if unit.arm in ("target", "draft"):
        model = train_unit(unit).model
        if unit.arm == "target":
            _save_target(unit, model)
        return evaluate_unit(unit, model)
    target = load_source(unit, "target")
    return _lookup(unit, target) if unit.arm == "ngram" else _drafts(unit, target)


def _drafts(unit, target):
    config, draft = unit.config, load_source(unit, "draft")
    speculative = Speculative(draft=draft, tokens=config.drafted)
    engine, prompts = _warm(unit, target, speculative), _texts(unit, config.prompts, config.prompt)
    sampled = observe(engine, [_sampled(p, config.new, seed) for seed, p in enumerate(prompts)])
    passes = sampled.tokens_per_pass(first=config.new // (MOST + 1))
    metrics = _compared(unit, engine, "greedy") | {
        "tokens_per_pass": float(np.mean(passes)),
        "passes_per_token": sampled.passes() / sum(map(len, sampled.tokens.values())),
        "rates": acceptance(passes, config.drafted),
        "overlap": _overlap(target, draft, _texts(unit, config.prompts, config.new)),
    }
    if config.drafted != 4:
        return metrics
    vocab, (one, other) = target.config.vocab_size, _load(unit, "law")
    with_drafts = _samples(unit, engine, seed=2)
    pooled = np.concatenate((one, other))
    chance = total_variation_by_chance(pooled, vocab, count=len(with_drafts))
    engines = [_warm(unit, target, which, slots=1) for which in (speculative, None)]
    requests = [greedy(prompt, config.new) for prompt in prompts[:3]]
    seconds = [[observe(e, [request]).seconds for e in engines] for request in requests]
    return metrics | {
        "variation_ratio": total_variation(with_drafts, one, vocab) / chance,
        "pass_cost": pass_cost(target, tokens=5, length=config.prompt, rounds=config.rounds),
        "speedup": float(np.median([theirs / ours for ours, theirs in seconds])),
    }


def _lookup(unit, target):
    speculative = Speculative(ngram=tuple(unit.config.ngram), tokens=unit.config.drafted)
    return _compared(unit, _warm(unit, target, speculative), "copied")


def _greedy_requests(unit):
    """Prompts for greedy tokens: held-out text, and text that is there twice and begins again."""
    length = unit.config.prompt
    texts = _texts(unit, unit.config.greedy_prompts, length)
    prompts = {"greedy": texts, "copied": [[*t, *t, *t[: length // 4]] for t in texts]}
    return {name: [greedy(p, unit.config.new) for p in some] for name, some in prompts.items()}


def _save_target(unit, model):
    """Write what the target generates without drafts into its folder."""
    engine = _warm(unit, model)
    for name, requests in _greedy_requests(unit).items():
        found = observe(engine, requests)
        np.save(unit.workdir / f"{name}.npy", list(found.tokens.values()))
        np.save(unit.workdir / f"{name}_logprobs.npy", list(found.logprobs.values()))
    np.save(unit.workdir / "law.npy", [_samples(unit, engine, seed=seed) for seed in (0, 1)])


def _load(unit, name):
    return np.load(unit.after["target"] / f"{name}.npy")


def _compared(unit, engine, name):
    """The greedy tokens of ``engine`` beside the target's; its passes per token."""
    found = observe(engine, _greedy_requests(unit)[name])
    rows, logprobs = (
        dict(zip(found.tokens, _load(unit, f"{name}{suffix}").tolist(), strict=True))
        for suffix in ("", "_logprobs")
    )
    differ, untied = parted(found, Observation([], rows, logprobs))
    passes = found.passes() / sum(map(len, rows.values()))
    return {"differ": differ, "untied": untied, "greedy_passes": passes}


def _overlap(target, draft, rows):
    """Σ min(p, q) at each token of ``rows``."""
    tokens = np.array(rows, np.int32)
    law = jax.jit(lambda model, tokens: jax.nn.softmax(model(tokens).logits_btv))
    return overlap(*(np.asarray(law(model, tokens)) for model in (target, draft)))


def _samples(unit, engine, seed):
    """Tokens ``[samples, time]`` after one prompt, as ``law`` of the configuration says."""
    law, (prompt,) = unit.config.law, _texts(unit, 1, unit.config.prompt)
    seeds = range(seed * law.requests, (seed + 1) * law.requests)
    found = observe(engine, [_sampled(prompt, law.new, s, law.samples) for s in seeds])
    return np.array(list(found.tokens.values()))


def _sampled(prompt, new, seed, samples=1):
    return Request(prompt, SamplingConfig(max_new_tokens=new, seed=seed), n=samples)


def _texts(unit, count, length):
    """The first ``length`` tokens of the first ``count`` held-out rows."""
    data = from_mapping(DataConfig, unit.config.data, "data")
    batches = iter(make_dataset(data, "validation"))
    rows = itertools.chain.from_iterable(batch["tokens"] for batch in batches)
    return [row[:length].tolist() for row in itertools.islice(rows, count)]


def _warm(unit, model, speculative=None, slots=None):
    config = unit.config
    length = 9 * config.prompt // 4 + config.new
    sizes = EngineConfig(slots=slots or config.slots, max_length=length, chunk=config.prompt)
    return warm_engine(model, sizes, speculative=speculative)
