"""RWKV-4 (Peng 2023, arXiv:2305.13048) and RWKV-7 (Peng 2025, arXiv:2503.14456).

RWKV is a recurrent network that is trained like a transformer. The size of its state does not
depend on the length, so the cost of a token does not grow with the context (RWKV-4, Table 1).
Models of up to 14 billion parameters are as good as transformers of their size (abstract). The
state of RWKV-7 is a matrix per head, from which old values are removed as new ones are added.
RWKV-7 is better than its predecessors, tracks states and recognises all regular languages, which
transformers cannot under standard conjectures (abstract; the word problem of a group is the usual
test).

Here both and a transformer are trained on text with equal parameters, and on the word problem of
the symmetric group of five elements: the inputs are swaps of neighbours, and after each swap the
answer is the permutation that all swaps so far make together.

    ablate run architecture/rwkv --scale=smoke    # a few steps, no findings
    ablate run architecture/rwkv                  # cpu: 2 cores; time in `ablate list`
    ablate run architecture/rwkv --scale=gpu      # one accelerator
    ablate run architecture/rwkv --scale=paper    # 1.5 billion parameters; 64 chips of TPU v5p
"""

import dataclasses
import math

import jax
from flax import nnx

from layers.config import from_mapping
from layers.decoder import Decoder, DecoderConfig
from layers.rwkv import RwkvConfig
from research.ablation import Arm, Claim, Unit, difference, mean
from research.ablation.language_model import check_unit, evaluate_unit, language_model, train_unit
from research.ablation.measure import check_decoding, decode_slowdown, state_bytes

PAPER = "Peng 2023, RWKV: Reinventing RNNs for the Transformer Era, arXiv:2305.13048; 2503.14456"
CODE = ("layers/rwkv.py", "layers/rwkv4.py", "layers/rwkv7.py")
MATCHED = (
    "tokens, steps, depth, width and, on text, parameters to 1% (by the feed-forward width, which "
    "is the same when they track)"
)
SEEDS = (0, 1, 2)
TOPOLOGY = "v5p:4x4x4"  # the slice of paper scale
VERSIONS = ("rwkv4", "rwkv7")


def get_config(scale):
    config = language_model(scale)
    width = config.model.width
    if scale == "paper":  # RWKV-7 World 1.5B (Table 1)
        width = 2048
        config.model.update(width=width, num_layers=24, vocab_size=65_536, tie_embeddings=False)
        config.model.attention.update(num_heads=32, num_kv_heads=32, head_dim=64)
        config.model.mlp.width = 5504
    head = {"smoke": 8, "cpu": 32}.get(scale, 64)
    rank = {"smoke": 4, "cpu": 16}.get(scale, 64)
    config.model.rwkv = dataclasses.asdict(RwkvConfig(head, rank, rank, rank // 2, 2 * rank))
    config.context = config.data.sequence_length
    config.long = 8
    config.decode_batch = {"smoke": 2, "cpu": 8}.get(scale, 32)
    config.tracking_steps = {"smoke": 6, "cpu": 1500}.get(scale, 20_000)
    config.part = "text"
    return config


def _parameters(model):
    config = from_mapping(DecoderConfig, model, "model")
    made = jax.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(made))


def _rwkv(version):
    """Overrides that make the model an RWKV with as many parameters as the transformer."""
    changes = {
        "pattern": (version,),
        "feed_forward": (version,),
        "position": "none",
        "norm": "layernorm",
        "norm_bias": True,
        "embedding_norm": True,
    }

    def width(config):
        model = config.model.copy_and_resolve_references().unlock()
        wanted = _parameters(model)
        model.update(changes)
        counts = []
        for size in (128, 256):
            model.mlp.width = size
            counts.append(_parameters(model))
        step = 8  # the hidden size is a multiple of it
        fitting = 128 + 128 * (wanted - counts[0]) / (counts[1] - counts[0])
        return max(step, step * round(fitting / step))

    return {f"model.{name}": value for name, value in changes.items()} | {"model.mlp.width": width}


TRACKING = {
    "part": "tracking",
    "data.source": "synthetic",
    "data.synthetic": dict(
        task="word_problem", vocab_size=128, parameters=dict(symbols=5, swaps=1)
    ),
    "data.sequence_length": 16,
    "data.batch_size": 64,
    "model.vocab_size": 128,
    "model.width": lambda config: config.model.width // 2,
    "model.attention.num_heads": 4,
    "model.attention.num_kv_heads": 4,
    "model.attention.head_dim": lambda config: config.model.width // 8,
    "model.num_layers": 2,
    "training.steps": lambda config: config.tracking_steps,
    "training.eval_every": lambda config: config.tracking_steps,
    "training.checkpoint_every": lambda config: max(1, config.tracking_steps // 4),
}

ARMS = (
    Arm("transformer"),
    *(Arm(version, _rwkv(version)) for version in VERSIONS),
    Arm("tracking_transformer", TRACKING),
    *(Arm(f"tracking_{version}", {**_rwkv(version), **TRACKING}) for version in VERSIONS),
)


def _constant(version, name):
    return (
        Claim(
            f"{version}_state_is_constant",
            f"{name}'s state is no larger after 8 times the context",
            paper="RWKV-4, Table 1: O(d), not O(T d)",
            measure=mean("state_growth", version),
            comparison="<",
            margin=1.0,
            deterministic=True,
        ),
        Claim(
            f"{version}_time_is_constant",
            f"After 8 times the context, {name} takes less than 1.2 times as long for a token",
            paper="RWKV-4, Table 1: O(d) a token",
            measure=mean("decode_slowdown", version),
            comparison="<",
            margin=1.2,
        ),
    )


CLAIMS = (
    Claim(
        "rwkv4_matches",
        "At equal parameters and tokens, RWKV-4's held-out loss is less than 0.05 nats above the "
        "transformer's",
        paper="RWKV-4, abstract: on par with similarly sized transformers",
        measure=difference("loss", "rwkv4", "transformer"),
        comparison="<",
        margin=0.05,
    ),
    Claim(
        "rwkv7_beats_rwkv4",
        "RWKV-7's held-out loss is below RWKV-4's",
        paper="RWKV-7, §1: ahead of its predecessors; no number against RWKV-4",
        measure=difference("loss", "rwkv7", "rwkv4"),
        comparison="<",
        margin=0.0,
    ),
    *_constant("rwkv4", "RWKV-4"),
    *_constant("rwkv7", "RWKV-7"),
    Claim(
        "rwkv7_tracks",
        "RWKV-7 names the permutation after at least 95% of the swaps",
        paper="RWKV-7, abstract: performs state tracking; no number at this size",
        measure=mean("accuracy", "tracking_rwkv7"),
        comparison=">",
        margin=0.95,
    ),
    Claim(
        "rwkv7_tracks_better_than_attention",
        "It names at least 20 points more of them than a transformer",
        paper="RWKV-7, abstract: exceeds what transformers can",
        measure=difference("accuracy", "tracking_rwkv7", "tracking_transformer"),
        comparison=">",
        margin=0.2,
    ),
    Claim(
        "rwkv7_tracks_better_than_rwkv4",
        "It names at least 20 points more of them than RWKV-4",
        paper="RWKV-7, §1: a diagonal state cannot; no number",
        measure=difference("accuracy", "tracking_rwkv7", "tracking_rwkv4"),
        comparison=">",
        margin=0.2,
    ),
)


def check(unit: Unit):
    config = unit.config
    check_unit(unit)
    if config.part != "tracking":
        check_decoding(unit, config.decode_batch, config.context, config.long * config.context)


def run(unit: Unit):
    config = unit.config
    model = train_unit(unit).model
    metrics = evaluate_unit(unit, model)
    if config.part == "tracking":
        return metrics
    short, long = config.context, config.long * config.context
    metrics["parameters"] = sum(leaf.size for leaf in jax.tree.leaves(model))
    metrics["state_growth"] = state_bytes(model, 1, long) / state_bytes(model, 1, short)
    metrics["decode_slowdown"] = decode_slowdown(
        model, batch=config.decode_batch, short=short, long=long
    )
    return metrics
