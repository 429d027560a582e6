"""Key-value caches in few bits: KIVI (Liu 2024, arXiv:2402.02750), FlexGen (Sheng 2023).

A cache in fewer bits holds longer contexts and larger batches. FlexGen stores keys and values in 4
bits with almost the same quality. KIVI goes to 2 bits with keys quantised by channel and values by
token, because a few channels of keys are large in all tokens (§3): Llama, Falcon and Mistral keep
their quality, with 2.6 times less peak memory.

Here one decoder for each seed is trained, and its held-out loss is measured with keys and values
read from its cache. int8, float8 and int4 are the caches of this code, with a scale for each token
and head, written into its bytes. The others have no storage here: their keys and values are rounded
in float32 as the loss is computed (`research.inference.cached_loss`). Those in groups are rounded
when a group of 32 tokens is complete, as in KIVI, by token or by channel of the keys. A small
decoder need not have large channels: a pilot of another one lost more by channel than by token at 4
bits.

    ablate run efficiency/kv_cache --scale=smoke    # a few steps, no findings
    ablate run efficiency/kv_cache                  # cpu: 2 cores; time in `ablate list`
    ablate run efficiency/kv_cache --scale=gpu      # one accelerator
    ablate run efficiency/kv_cache --scale=paper    # the sizes of Llama-2 7B; 64 chips of TPU v5p
"""

from layers.config import from_mapping
from layers.state import CacheConfig
from research.ablation import Arm, Claim, Unit, difference, mean
from research.ablation.language_model import (
    check_unit,
    evaluate_unit,
    language_model,
    load_source,
    train_unit,
)
from research.ablation.measure import state_bytes
from research.inference.cached_loss import CachedNextToken, Rounding

PAPER = (
    "Liu 2024, KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache, arXiv:2402.02750; "
    "Sheng 2023, FlexGen: High-Throughput Generative Inference, arXiv:2303.06865"
)
CODE = ("pallas_kernels/stored.py", "layers/cache.py", "research/inference/cached_loss.py")
MATCHED = "one model for each seed, and the held-out text; arms differ in how the cache stores"
SEEDS = (0, 1, 2, 3, 4)
TOPOLOGY = "v5p:4x4x4"  # the slice of paper scale
BASE = "base"


def get_config(scale):
    config = language_model(scale)
    if scale == "cpu":
        config.model.update(width=256, num_layers=4)
        config.model.attention.update(num_heads=4, num_kv_heads=4, head_dim=64)
        config.model.mlp.width = 680
        config.training.steps = 360
        config.training.optimizer.update(learning_rate=2e-3, warmup_steps=18)
        config.training.update(eval_every=120, checkpoint_every=120)
    config.cache_length = 16 if scale == "smoke" else 1024
    config.cache = dict(dtype="float32")
    config.rounding = dict(bits=0, keys="token", group=1)
    return config


def _rounded(bits, keys="token", group=1):
    values = {"rounding.bits": bits}
    if group > 1:
        values |= {"rounding.keys": keys, "rounding.group": group}
    return values


def _arm(name, overrides):
    return Arm(name, overrides, after=(BASE,))


ARMS = (
    Arm(BASE),
    *(_arm(name, {"cache.dtype": name}) for name in ("int8", "float8_e4m3fn", "int4")),
    _arm("int2", _rounded(2)),
    *(
        _arm(f"int{bits}_by_{keys}", _rounded(bits, keys, 32))
        for bits in (4, 2)
        for keys in ("token", "channel")
    ),
)

LEARNS = Claim(
    "learns",
    "The model's held-out loss is below 1.8 nats",
    paper="",
    measure=mean("loss", BASE),
    comparison="<",
    margin=1.8,
)


def _bytes(arm, most):
    return Claim(
        f"bytes_{arm}",
        f"With its scales, an {arm} cache takes at most {most:g} of the bytes of a float32 one",
        paper="no number: the papers compare with 16 bits and have groups of other sizes",
        measure=mean("bytes_ratio", arm),
        comparison="<",
        margin=most,
        deterministic=True,
    )


def _cost(arm, comparison, margin, statement, paper):
    return Claim(
        f"cost_{arm}",
        statement,
        paper=paper,
        measure=difference("loss", arm, BASE),
        comparison=comparison,
        margin=margin,
        gate=LEARNS,
    )


def _by_channel(bits, paper):
    return Claim(
        f"by_channel_{bits}_bits",
        f"At {bits} bits, keys by channel have a lower loss than keys by token",
        paper=paper,
        measure=difference("loss", f"int{bits}_by_channel", f"int{bits}_by_token"),
        comparison="<",
        margin=0.0,
        gate=LEARNS,
    )


CLAIMS = (
    Claim(
        "exact",
        "With a float32 cache the held-out loss is that without a cache within 0.0001 nats",
        paper="a cache stores what would be computed again",
        measure=difference("loss", BASE, BASE, "loss_without_cache"),
        comparison="within",
        margin=1e-4,
    ),
    _bytes("int8", 0.28),
    _bytes("int4", 0.16),
    _cost("int8", "<", 1e-3, "An int8 cache costs less than 0.001 nats", "no number for 8 bits"),
    _cost(
        "float8_e4m3fn", "<", 5e-3, "A float8 cache costs less than 0.005 nats",
        "no number for float8",
    ),
    _cost(
        "int4", "<", 0.02, "An int4 cache costs less than 0.02 nats",
        "FlexGen, abstract: 4 bits, with negligible loss of accuracy",
    ),
    _cost(
        "int2", ">", 0.05, "2 bits for each token cost more than 0.05 nats",
        "KIVI, §3: keys by token lose accuracy at 2 bits",
    ),
    _by_channel(4, "KIVI, abstract: keys should be quantised by channel, values by token"),
    _by_channel(2, "KIVI, abstract: keys should be quantised by channel, values by token"),
)  # fmt: skip


def check(unit: Unit):
    check_unit(unit)
    _cache(unit)
    _rounding(unit)


def _cache(unit):
    return from_mapping(CacheConfig, unit.config.cache, "cache")


def _rounding(unit):
    """The `Rounding` of the unit, or None: with 0 bits."""
    given = unit.config.rounding
    return from_mapping(Rounding, given, "rounding") if given.bits else None


def run(unit: Unit):
    model = load_source(unit) if unit.after else train_unit(unit).model
    cache, rounding = _cache(unit), _rounding(unit)
    metrics = evaluate_unit(unit, model, objective=CachedNextToken(cache=cache, rounding=rounding))
    if not unit.after:
        metrics["loss_without_cache"] = evaluate_unit(unit, model)["loss"]
    exact, stored = (
        state_bytes(model, 1, unit.config.cache_length, kind)
        for kind in (CacheConfig(dtype="float32"), cache)
    )
    if rounding is not None:
        attention = model.config.part("attention")
        channels = attention.channels(model.config.width)
        tokens = unit.config.cache_length * attention.kv_heads * model.config.num_layers
        stored = tokens * rounding.bytes_per_token(channels)
    return metrics | {"bytes_ratio": stored / exact}
