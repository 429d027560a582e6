"""Mamba: selective state spaces (Gu & Dao 2023, arXiv:2312.00752) and Mamba-2 (arXiv:2405.21060).

A state space whose step Δ and maps B and C depend on the token can select what to keep. Table 1
(selective copying, 4,096 tokens, 16 of them to copy; accuracy): in Mamba's block 56.4% without
selection (S4), 99.8% with it (S6). Table 2 (induction heads, trained at 256 tokens): perfect up to
a million tokens, where attention fails past twice the trained length. Table 7 (perplexity): none
selective 10.93, Δ alone 9.81, B alone 10.15, C alone 9.98, all 8.71. §4.5: the scan's time is
linear in the length.

Here two layers of width 64 learn both tasks. Copying is 4 symbols among 32 tokens at cpu scale. The
induction task is trained with eight queries per sequence and tested with one at a random position.

    ablate run architecture/mamba --scale=smoke    # a few steps, no findings
    ablate run architecture/mamba                  # cpu: 2 cores; time in `ablate list`
    ablate run architecture/mamba --scale=gpu      # one accelerator
    ablate run architecture/mamba --scale=paper    # up to 400,000 steps; one TPU v5p
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from layers.attention import AttentionConfig
from layers.config import from_mapping
from layers.decoder import Decoder, DecoderConfig
from layers.mamba import MambaConfig
from research.ablation import Arm, Claim, Unit, difference, mean
from research.ablation.language_model import check_unit, evaluate_unit, language_model, train_unit
from research.ablation.measure import growth, median_times

PAPER = (
    "Gu & Dao 2023, Mamba: Linear-Time Sequence Modeling with Selective State Spaces, 2312.00752"
)
CODE = ("layers/mamba.py", "layers/mamba2.py")
MATCHED = "tokens, steps, width and depth; a layer of attention has an MLP beside it"
SEEDS = (0, 1, 2)
TOPOLOGY = "v5p:1x1x1"  # the slice of paper scale
FACTORS = (1, 2, 4, 16, 64)  # multiples of the trained length, in the induction task


def get_config(scale):
    config = language_model(scale)
    length, symbols, steps, batch, induction_steps = {
        "smoke": (16, 2, 6, 4, 6),
        "cpu": (32, 4, 600, 32, 400),
        "gpu": (1024, 16, 10_000, 64, 10_000),
        "paper": (4096, 16, 400_000, 64, 25 * 8192),  # §4.1 and appendix E.1
    }[scale]
    vocabulary = 10 if scale == "cpu" else 18
    mamba = MambaConfig(state=8 if scale == "cpu" else 16)
    config.model.update(
        vocab_size=vocabulary,
        width=64,
        num_layers=2,
        pattern=("mamba",),
        feed_forward=("none",),
        position="none",
        mamba=dataclasses.asdict(mamba),
        attention=dataclasses.asdict(AttentionConfig(num_heads=4)),
        dtype="float32",
        scan=scale != "cpu",
        remat="none",
    )
    config.model.mlp.width = 172
    config.data.update(
        source="synthetic",
        sequence_length=length,
        batch_size=batch,
        synthetic=dict(
            config.data.synthetic,
            task="selective_copy",
            vocab_size=vocabulary,
            parameters=dict(symbols=symbols),
        ),
    )
    config.training.update(
        steps=steps, eval_every=steps, checkpoint_every=max(1, steps // 4), eval_batches=8
    )
    config.training.optimizer.learning_rate = 1e-2 if scale in ("smoke", "cpu") else 2e-3
    config.training.optimizer.warmup_steps = max(1, steps // 20)
    if scale in ("gpu", "paper"):
        config.mesh.update(data=-1, fsdp=1)
    config.induction_steps = induction_steps
    config.induction_length = 32 if scale == "smoke" else 256
    config.tested_examples = {"smoke": 4, "cpu": 64}.get(scale, 512)
    config.timed_lengths = {"smoke": (64, 128), "cpu": (512, 1024, 2048, 4096)}.get(
        scale, (2048, 4096, 8192, 16_384, 32_768)
    )
    config.part = "copying"
    return config


ATTENTION = {
    "model.pattern": ("attention",),
    "model.feed_forward": ("mlp",),
    "model.position": "rotary",
}
MAMBA2 = {
    "model.pattern": ("mamba2",),
    "model.mamba.head_dim": 16,
}
INDUCTION = {
    "part": "induction",
    "data.synthetic.task": "induction",
    "data.synthetic.vocab_size": 16,
    "data.synthetic.parameters": dict(queries=8),
    "data.sequence_length": lambda config: config.induction_length,
    "data.batch_size": lambda config: min(16, config.data.batch_size),
    "model.vocab_size": 16,
    "training.steps": lambda config: config.induction_steps,
    "training.eval_every": lambda config: config.induction_steps,
    "training.optimizer.warmup_steps": 1,
}
TIME = {"part": "time"}


def _selective(*names):
    return {"model.mamba.selective": names}


ARMS = (
    Arm("copying_mamba"),
    Arm("copying_mamba2", MAMBA2),
    Arm("copying_attention", ATTENTION),
    Arm("copying_fixed", _selective()),
    Arm("copying_delta", _selective("delta")),
    Arm("copying_b", _selective("b")),
    Arm("copying_c", _selective("c")),
    Arm("induction_mamba", INDUCTION),
    Arm("induction_mamba2", {**INDUCTION, **MAMBA2}),
    Arm("induction_attention", {**INDUCTION, **ATTENTION}),
    Arm("time_mamba", TIME),
    Arm("time_mamba2", {**TIME, **MAMBA2}),
    Arm("time_attention", {**TIME, **ATTENTION}),
)


def _delta_leads(results):
    others = [results.metric(f"copying_{name}", "accuracy") for name in ("b", "c")]
    return results.metric("copying_delta", "accuracy") - np.maximum(*others)


def _extrapolates(arm, name):
    return Claim(
        f"{arm}_extrapolates",
        f"Trained at one length and tested at {FACTORS[-1]} times it, {name} finds the answer in "
        "at least 95% of sequences",
        paper="Table 2: 100% up to a million tokens, 4,096 times",
        measure=mean(f"accuracy_{FACTORS[-1]}x", f"induction_{arm}"),
        comparison=">",
        margin=0.95,
    )


CLAIMS = (
    Claim(
        "selection_copies",
        "Mamba copies at least 97% of the symbols that stand anywhere",
        paper="Table 1: 99.8%",
        measure=mean("accuracy", "copying_mamba"),
        comparison=">",
        margin=0.97,
    ),
    Claim(
        "fixed_does_not",
        "It copies at least 20 points more of them than without selection",
        paper="Table 1: 99.8% against 56.4%",
        measure=difference("accuracy", "copying_mamba", "copying_fixed"),
        comparison=">",
        margin=0.2,
    ),
    Claim(
        "mamba2_copies",
        "Mamba-2 copies at least 97% too",
        paper="Mamba-2, §9.1 (another recall task, on which it is better than Mamba)",
        measure=mean("accuracy", "copying_mamba2"),
        comparison=">",
        margin=0.97,
    ),
    Claim(
        "delta_matters_most",
        "With one of Δ, B and C selective, Δ copies the most",
        paper="Table 7: perplexity 9.81 (Δ), 10.15 (B), 9.98 (C)",
        measure=_delta_leads,
        comparison=">",
        margin=0.0,
    ),
    Claim(
        "delta_is_not_all",
        "With Δ alone selective, fewer are copied than with all three",
        paper="Table 7: perplexity 9.81 against 8.71",
        measure=difference("accuracy", "copying_delta", "copying_mamba"),
        comparison="<",
        margin=0.0,
    ),
    _extrapolates("mamba", "Mamba"),
    _extrapolates("mamba2", "Mamba-2"),
    Claim(
        "attention_does_not",
        "At 4 times the trained length, attention finds it in at least 20 points fewer than at one",
        paper="Table 2: attention fails past twice the length",
        measure=difference(
            "accuracy_4x", "induction_attention", "induction_attention", "accuracy_1x"
        ),
        comparison="<",
        margin=-0.2,
        gate=Claim(
            "learnable",
            "Attention learns the task at the trained length (at least 90%)",
            paper="Table 2: 100%",
            measure=mean("accuracy_1x", "induction_attention"),
            comparison=">",
            margin=0.9,
        ),
    ),
    Claim(
        "time_is_linear",
        "Mamba's time grows with at most the 1.2th power of the length",
        paper="§4.5, Figure 8: linear",
        measure=mean("growth", "time_mamba"),
        comparison="<",
        margin=1.2,
    ),
    Claim(
        "attention_grows_faster",
        "Attention's time grows with a power at least 0.2 greater",
        paper="Figure 8: quadratic",
        measure=difference("growth", "time_attention", "time_mamba"),
        comparison=">",
        margin=0.2,
    ),
)


def check(unit: Unit):
    if unit.config.part != "time":
        check_unit(unit)


def run(unit: Unit):
    if unit.config.part == "time":
        return _time(unit)
    model = train_unit(unit).model
    if unit.config.part == "copying":
        return evaluate_unit(unit, model)
    metrics = {}
    config = unit.config.copy_and_resolve_references().unlock()
    # one query, its answer drawn anywhere before it
    config.data.synthetic.parameters = dict(queries=1)
    config.data.synthetic.validation_examples = config.tested_examples
    config.data.batch_size = 4
    test = dataclasses.replace(unit, config=config)
    for factor in FACTORS:
        length = factor * config.induction_length
        found = evaluate_unit(test, model, tokens=config.tested_examples * length, length=length)
        metrics[f"accuracy_{factor}x"] = found["accuracy"]
    return metrics


def _time(unit: Unit):
    """The exponent p of time ∝ lengthᵖ for a forward pass."""
    config = from_mapping(DecoderConfig, unit.config.model, "model")
    model = jax.jit(lambda: Decoder(config, rngs=nnx.Rngs(unit.seed)))()
    forward = jax.jit(lambda model, tokens: model(tokens).logits_btv)
    lengths = unit.config.timed_lengths
    runs = [
        functools.partial(forward, model, jnp.zeros((1, length), jnp.int32)) for length in lengths
    ]
    seconds = median_times(runs, rounds=7)
    unit.progress(1, 1, {})
    return {"growth": growth(lengths, seconds), "seconds": seconds}
