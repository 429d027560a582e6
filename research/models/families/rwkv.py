"""RWKV-4 with the names of transformers, and RWKV-7 with the names of its authors' files."""

from typing import Any

from layers.decoder import DecoderConfig
from layers.mlp import MlpConfig
from layers.rwkv import RwkvConfig
from research.models.families.family import Family, affine, read_layers
from research.models.fields import LARGEST, Fields
from research.models.table import Row

# ε of transformers' last norm, whatever layer_norm_epsilon is
_FINAL_EPS = 1e-5


def _read_rwkv4(fields: Fields) -> DecoderConfig:
    width = fields.integer("hidden_size")
    channels = fields.integer("attention_hidden_size", width, null=width)
    eps = fields.number("layer_norm_epsilon", _FINAL_EPS, above=0)
    # 0 or less: never
    every = fields.integer("rescale_every", 6, at_least=-LARGEST)
    return DecoderConfig(
        vocab_size=fields.integer("vocab_size"),
        width=width,
        num_layers=read_layers(fields),
        mlp=MlpConfig(fields.integer("intermediate_size", 4 * width, null=4 * width)),
        rwkv=RwkvConfig(
            channels=None if channels == width else channels, rescale_every=max(0, every)
        ),
        pattern=("rwkv4",),
        feed_forward=("rwkv4",),
        position="none",
        norm="layernorm",
        norm_eps=eps,
        final_norm_eps=None if eps == _FINAL_EPS else _FINAL_EPS,
        norm_bias=True,
        embedding_norm=True,
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        max_length=fields.integer("context_length", None),
    )


def _write_rwkv4(config: DecoderConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "attention_hidden_size": config.part("rwkv").channels or config.width,
        "num_hidden_layers": config.num_layers,
        "intermediate_size": config.part("mlp").width,
        "layer_norm_epsilon": config.norm_eps,
        "rescale_every": config.part("rwkv").rescale_every,
        "tie_word_embeddings": config.tie_embeddings,
        "context_length": config.max_length or 1024,
    }


def _read_rwkv7(fields: Fields) -> DecoderConfig:
    # the authors' files have an embedding and a head
    fields.only(tie_word_embeddings=False)
    return DecoderConfig(
        vocab_size=fields.integer("vocab_size"),
        width=fields.integer("hidden_size"),
        num_layers=read_layers(fields),
        mlp=MlpConfig(fields.integer("intermediate_size")),
        rwkv=RwkvConfig(**{size: fields.integer(size) for size in _SIZES}),
        pattern=("rwkv7",),
        feed_forward=("rwkv7",),
        position="none",
        norm="layernorm",
        norm_eps=1e-5,
        norm_bias=True,
        embedding_norm=True,
        tie_embeddings=False,
    )


def _write_rwkv7(config: DecoderConfig) -> dict[str, Any]:
    rwkv = config.part("rwkv")
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.num_layers,
        "intermediate_size": config.part("mlp").width,
        **{size: getattr(rwkv, size) for size in _SIZES},
    }


_SIZES = ("head_dim", "decay_rank", "rate_rank", "value_rank", "gate_rank")
_BLOCK = "rwkv.blocks.{l}."
_RWKV4_ROWS = (
    Row("rwkv.embeddings.weight", "v d -> v d", ("embedding/table",)),
    Row("head.weight", "v d -> d v", ("head/weight",)),
    *affine("rwkv.blocks.0.pre_ln", "embedding_norm"),
    *affine("rwkv.ln_out", "final_norm"),
    *affine(_BLOCK + "ln1", "mixer_norm"),
    *affine(_BLOCK + "ln2", "mlp_norm"),
    Row(_BLOCK + "attention.time_decay", "d -> d", ("mixer/decay",)),
    Row(_BLOCK + "attention.time_first", "d -> d", ("mixer/bonus",)),
    *(
        Row(f"{_BLOCK}attention.time_mix_{name}", "1 1 d -> d", (f"mixer/mix_{name}",))
        for name in ("key", "value", "receptance")
    ),
    *(
        Row(f"{_BLOCK}attention.{name}.weight", "c d -> d c", (f"mixer/{name}/weight",))
        for name in ("key", "value", "receptance")
    ),
    Row(_BLOCK + "attention.output.weight", "d c -> c d", ("mixer/out/weight",)),
    *(
        Row(f"{_BLOCK}feed_forward.time_mix_{name}", "1 1 d -> d", (f"mlp/mix_{name}",))
        for name in ("key", "receptance")
    ),
    Row(_BLOCK + "feed_forward.key.weight", "f d -> d f", ("mlp/key/weight",)),
    Row(_BLOCK + "feed_forward.receptance.weight", "c d -> d c", ("mlp/receptance/weight",)),
    Row(_BLOCK + "feed_forward.value.weight", "d f -> f d", ("mlp/value/weight",)),
)

_MIX, _FEED = "blocks.{l}.att.", "blocks.{l}.ffn."
# name in the checkpoint → name in the Decoder
_LOW_RANKS = {"w": "decay", "a": "rate", "v": "residual", "g": "gate"}
_MIXES = {"r": "receptance", "w": "decay", "k": "key", "v": "value", "a": "rate", "g": "gate"}
_RWKV7_ROWS = (
    Row("emb.weight", "v d -> v d", ("embedding/table",)),
    Row("head.weight", "v d -> d v", ("head/weight",)),
    *affine("blocks.0.ln0", "embedding_norm"),
    *affine("ln_out", "final_norm"),
    *affine("blocks.{l}.ln1", "mixer_norm"),
    *affine("blocks.{l}.ln2", "mlp_norm"),
    *(Row(f"{_MIX}x_{name}", "1 1 d -> d", (f"mixer/mixes/{_MIXES[name]}",)) for name in _MIXES),
    *(
        row
        for name, part in _LOW_RANKS.items()
        for row in (
            Row(f"{_MIX}{name}1", "d r -> d r", (f"mixer/{part}/down/weight",)),
            Row(f"{_MIX}{name}2", "r (h c) -> r h c", (f"mixer/{part}/up/weight",)),
            Row(f"{_MIX}{name}0", "1 1 (h c) -> h c", (f"mixer/{part}/up/bias",)),
        )
    ),
    Row(_MIX + "k_k", "1 1 (h c) -> h c", ("mixer/key_removal",)),
    Row(_MIX + "k_a", "1 1 (h c) -> h c", ("mixer/key_rate",)),
    Row(_MIX + "r_k", "h c -> h c", ("mixer/bonus",)),
    Row(_MIX + "ln_x.weight", "(h c) -> h c", ("mixer/norm_scale",)),
    Row(_MIX + "ln_x.bias", "(h c) -> h c", ("mixer/norm_bias",)),
    *(
        Row(f"{_MIX}{name}.weight", "(h c) d -> d h c", (f"mixer/{name}/weight",))
        for name in ("receptance", "key", "value")
    ),
    Row(_MIX + "output.weight", "d (h c) -> h c d", ("mixer/out/weight",)),
    Row(_FEED + "x_k", "1 1 d -> d", ("mlp/mix_key",)),
    Row(_FEED + "key.weight", "f d -> d f", ("mlp/key/weight",)),
    Row(_FEED + "value.weight", "d f -> f d", ("mlp/value/weight",)),
)

RWKVS = (
    Family(
        "RwkvForCausalLM",
        "rwkv",
        _read_rwkv4,
        _write_rwkv4,
        _RWKV4_ROWS,
        "rwkv.",
        ignored=(),
    ),
    Family(
        "RWKV_x070",
        "rwkv7",
        _read_rwkv7,
        _write_rwkv7,
        _RWKV7_ROWS,
        prefix="",
        ignored=(),
        # the first layer has no earlier values to mix with
        absent=tuple(f"blocks.0.att.v{part}" for part in range(3)),
    ),
)
