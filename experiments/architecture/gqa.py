"""Grouped-query attention: GQA (Ainslie 2023, arXiv:2305.13245).

The paper converts multi-head T5 checkpoints to fewer key-value heads and trains them for a few more
steps. Table 1 (T5-XXL; inference seconds per sample, average score): MHA 1.51 s, 47.2; MQA 0.24 s,
46.6; GQA-8 0.28 s, 47.1. Mean-pooling the heads of a group is better than keeping its first head,
which is better than new heads (Figure 4); 5% of the pre-training steps are enough (Figure 5).

Here a decoder with 8 query heads and 8 (MHA), 2 (GQA) or 1 (MQA) key-value heads is trained from
scratch on equal tokens. The multi-head model is then converted to GQA in the three ways and trained
for 5% more steps, and so is the multi-head model itself. At cpu scale 5% are a dozen steps: do not
expect the effect of the paper's 50,000.

    ablate run architecture/gqa --scale=smoke    # a few steps, no findings
    ablate run architecture/gqa                  # cpu: 2 cores; time in `ablate list`
    ablate run architecture/gqa --scale=gpu      # one accelerator
    ablate run architecture/gqa --scale=paper    # T5-XXL's decoder; 64 chips of TPU v5p
"""

import dataclasses

import jax
from flax import nnx

from layers.decoder import Decoder
from layers.grouping import group_kv_heads
from research.ablation import Arm, Claim, Unit, difference, mean, ratio
from research.ablation.language_model import (
    check_unit,
    evaluate_unit,
    language_model,
    load_source,
    train_unit,
)
from research.ablation.measure import check_decoding, decode_speedup, state_bytes

PAPER = "Ainslie 2023, GQA: Training Generalized Multi-Query Transformer Models, arXiv:2305.13245"
CODE = ("layers/attention.py", "layers/grouping.py")
MATCHED = "tokens, width, depth and query heads; parameters differ by the key and value heads"
SEEDS = (0, 1, 2)
TOPOLOGY = "v5p:4x4x4"  # the slice of paper scale


def get_config(scale):
    config = language_model(scale)
    config.grouped_kv_heads = 8 if scale == "paper" else 2
    config.conversion = "none"
    config.uptraining_steps = max(1, config.training.steps // 20)  # 5% (§3.1)
    config.decode_batch = {"smoke": 2, "cpu": 8}.get(scale, 32)
    config.decode_length = {"smoke": 16, "cpu": 1024}.get(scale, 8192)
    if scale == "paper":
        config.model.update(width=4096, num_layers=24)
        config.model.attention.update(num_heads=64, num_kv_heads=64, head_dim=64)
        config.model.mlp.update(width=10_240, activation="geglu_tanh")
    return config


def _grouped(config):
    return config.grouped_kv_heads


def _uptrained(conversion):
    """An arm: the multi-head model of the same seed, converted and trained for 5% more steps."""
    overrides = {
        "conversion": conversion,
        "training.steps": lambda config: config.uptraining_steps,
        "training.optimizer.warmup_steps": 1,
    }
    if conversion != "multi_head":
        overrides["model.attention.num_kv_heads"] = _grouped
    return Arm(f"uptrained_{conversion}", overrides, after=("mha",))


ARMS = (
    Arm("mha"),
    Arm("gqa", {"model.attention.num_kv_heads": _grouped}),
    Arm("mqa", {"model.attention.num_kv_heads": 1}),
    *(_uptrained(conversion) for conversion in ("mean", "first", "random", "multi_head")),
)

CLAIMS = (
    Claim(
        "quality",
        "Trained on equal tokens, GQA's held-out loss is less than 0.02 nats above multi-head's",
        paper="Table 1: average score 47.1 (GQA-8) against 47.2 (MHA)",
        measure=difference("loss", "gqa", "mha"),
        comparison="<",
        margin=0.02,
    ),
    Claim(
        "multi_query_is_worse",
        "Multi-query attention's held-out loss is above GQA's",
        paper="Table 1: average score 46.6 (MQA) against 47.1 (GQA-8)",
        measure=difference("loss", "mqa", "gqa"),
        comparison=">",
        margin=0.0,
    ),
    Claim(
        "mean_beats_first",
        "After 5% uptraining, mean-pooled heads have a lower loss than first heads",
        paper="Figure 4: mean > first > random",
        measure=difference("loss", "uptrained_mean", "uptrained_first"),
        comparison="<",
        margin=0.0,
    ),
    Claim(
        "first_beats_random",
        "After 5% uptraining, first heads have a lower loss than fresh ones",
        paper="Figure 4: mean > first > random",
        measure=difference("loss", "uptrained_first", "uptrained_random"),
        comparison="<",
        margin=0.0,
    ),
    Claim(
        "uptraining_suffices",
        "Mean-pooled and uptrained by 5%, GQA is less than 0.05 nats above the multi-head model "
        "trained on for as long",
        paper="Table 1: uptrained GQA-8 47.1 against MHA 47.2",
        measure=difference("loss", "uptrained_mean", "uptrained_multi_head"),
        comparison="<",
        margin=0.05,
    ),
    Claim(
        "cache",
        "GQA's key-value cache is at most a quarter of multi-head's",
        paper="§2.2: the cache shrinks by the ratio of key-value heads",
        measure=ratio("cache_bytes", "gqa", "mha"),
        comparison="<",
        margin=0.25,
        deterministic=True,
    ),
    Claim(
        "decoding",
        "After a long context, GQA decodes a token at least 1.5 times as fast as multi-head",
        paper="Table 1: 0.28 s against 1.51 s a sample, 5.4 times",
        measure=mean("decode_speedup", "gqa"),
        comparison=">",
        margin=1.5,
    ),
)


def check(unit: Unit):
    check_unit(unit)
    check_decoding(unit, unit.config.decode_batch, unit.config.decode_length)


def run(unit: Unit):
    config, attention = unit.config, unit.config.model.attention

    def convert(fresh: Decoder) -> Decoder:
        trained = load_source(unit)
        if config.conversion == "multi_head":
            return trained
        key = jax.random.key(unit.seed)
        return group_kv_heads(trained, attention.num_kv_heads, config.conversion, key=key)

    model = train_unit(unit, convert if unit.after else None).model
    metrics = evaluate_unit(unit, model)
    cost = dict(batch=config.decode_batch, length=config.decode_length)
    metrics["cache_bytes"] = state_bytes(model, **cost)
    if not unit.after:
        heads = dataclasses.replace(
            model.config.part("attention"), num_kv_heads=attention.num_heads
        )
        multi_head = dataclasses.replace(model.config, attention=heads)
        baseline = Decoder(multi_head, rngs=nnx.Rngs(0))
        metrics["decode_speedup"] = decode_speedup(model, baseline, **cost)
    return metrics
