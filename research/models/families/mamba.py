"""Mamba and Mamba-2: a stack of mixers without feed-forward layers."""

import math
from collections.abc import Sequence
from typing import Any

from layers.decoder import DecoderConfig
from layers.mamba import MambaConfig
from layers.mamba2 import CONVOLVED
from research.models.families.family import Family, parts, read_layers
from research.models.fields import Fields, is_finite
from research.models.table import Row


def _read(fields: Fields, kind: str, tied: bool, **sizes: Any) -> DecoderConfig:
    """``kind`` and ``sizes`` are the mixer's; ``tied`` is the default of tie_word_embeddings."""
    fields.only(hidden_act="silu")
    return DecoderConfig(
        vocab_size=fields.integer("vocab_size"),
        width=fields.integer("hidden_size"),
        num_layers=read_layers(fields),
        mamba=MambaConfig(
            expand=fields.integer("expand", 2),
            convolution=fields.integer("conv_kernel", 4),
            bias=fields.flag("use_bias", False),
            convolution_bias=fields.flag("use_conv_bias", True),
            delta_min=fields.number("time_step_min", 0.001, above=0),
            delta_max=fields.number("time_step_max", 0.1, above=0),
            **sizes,
        ),
        pattern=(kind,),
        feed_forward=("none",),
        position="none",
        norm_eps=fields.number("layer_norm_epsilon", 1e-5, above=0),
        tie_embeddings=fields.flag("tie_word_embeddings", tied),
    )


def _write(config: DecoderConfig) -> dict[str, Any]:
    mamba = config.part("mamba")
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.num_layers,
        "state_size": mamba.state,
        "expand": mamba.expand,
        "conv_kernel": mamba.convolution,
        "use_bias": mamba.bias,
        "use_conv_bias": mamba.convolution_bias,
        "time_step_min": mamba.delta_min,
        "time_step_max": mamba.delta_max,
        "hidden_act": "silu",
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
    }


def _read_mamba(fields: Fields) -> DecoderConfig:
    width = fields.integer("hidden_size")
    fields.only(intermediate_size=fields.integer("expand", 2) * width)
    rank = MambaConfig().rank(width)
    if fields.unused("time_step_rank") != "auto":
        rank = fields.integer("time_step_rank", rank)
    state = fields.integer("state_size", 16)
    return _read(fields, "mamba", True, state=state, delta_rank=rank)


def _write_mamba(config: DecoderConfig) -> dict[str, Any]:
    mamba = config.part("mamba")
    return {
        **_write(config),
        "intermediate_size": mamba.expand * config.width,
        "time_step_rank": mamba.rank(config.width),
    }


def _read_mamba2(fields: Fields) -> DecoderConfig:
    limit = fields.items("time_step_limit", [0.0, math.inf])
    low, high = _range(fields, limit)
    fields.only(rms_norm=True)
    config = _read(
        fields,
        "mamba2",
        False,
        state=fields.integer("state_size", 128),
        head_dim=fields.integer("head_dim", 64),
        groups=fields.integer("n_groups", 8),
        delta_least=low,
        delta_most=None if high == math.inf else high,
    )
    fields.only(num_heads=config.part("mamba").heads(config.width))
    return config


# JSON has no infinity; transformers ≥ 5 writes this
_INFINITY = {"__float__": "Infinity"}


def _range(fields: Fields, limit: Sequence[Any]) -> tuple[float, float]:
    """The least and the largest step size of ``limit``, the value of time_step_limit."""
    values = [math.inf if value in (_INFINITY, "Infinity") else value for value in limit]
    numeric = all(is_finite(value) or value == math.inf for value in values)
    if len(values) != 2 or not numeric or not 0 <= values[0] < values[1]:
        fields.refuse("time_step_limit", limit, "must be [low, high] with 0 ≤ low < high")
    return float(values[0]), float(values[1])


def _write_mamba2(config: DecoderConfig) -> dict[str, Any]:
    mamba = config.part("mamba")
    return {
        **_write(config),
        "num_heads": mamba.heads(config.width),
        "head_dim": mamba.head_dim,
        "n_groups": mamba.groups,
        "time_step_limit": [
            mamba.delta_least,
            _INFINITY if mamba.delta_most is None else mamba.delta_most,
        ],
    }


_MIXER = "backbone.layers.{l}.mixer."
_MODEL_ROWS = (
    Row("backbone.embeddings.weight", "v d -> v d", ("embedding/table",)),
    Row("backbone.norm_f.weight", "d -> d", ("final_norm/scale",)),
    Row("lm_head.weight", "v d -> d v", ("head/weight",)),
    Row("backbone.layers.{l}.norm.weight", "d -> d", ("mixer_norm/scale",)),
    Row(_MIXER + "out_proj.weight", "d i -> i d", ("mixer/out/weight",)),
    Row(_MIXER + "out_proj.bias", "d -> d", ("mixer/out/bias",)),
)
_MAMBA_ROWS = (
    *_MODEL_ROWS,
    Row(_MIXER + "conv1d.weight", "i 1 n -> n i", ("mixer/convolution/weight",)),
    Row(_MIXER + "conv1d.bias", "i -> i", ("mixer/convolution/bias",)),
    Row(_MIXER + "in_proj.weight", "i d -> d i", parts("mixer", "weight", "into", "gate"), join=1),
    Row(_MIXER + "in_proj.bias", "i -> i", parts("mixer", "bias", "into", "gate")),
    Row(
        _MIXER + "x_proj.weight",
        "r i -> i r",
        parts("mixer", "weight", "delta_down", "b", "c"),
        join=1,
    ),
    Row(_MIXER + "dt_proj.weight", "i r -> r i", ("mixer/delta_up/weight",)),
    Row(_MIXER + "dt_proj.bias", "i -> i", ("mixer/delta_bias",)),
    Row(_MIXER + "A_log", "i n -> i n", ("mixer/log_rate",)),
    Row(_MIXER + "D", "i -> i", ("mixer/skip",)),
)
# the parts of the one input projection, in order; the middle three are convolved
_PARTS = ("gate", "into", "b", "c", "delta")
_MAMBA2_ROWS = (
    *_MODEL_ROWS,
    Row(_MIXER + "in_proj.weight", "i d -> d i", parts("mixer", "weight", *_PARTS), join=1),
    Row(_MIXER + "in_proj.bias", "i -> i", parts("mixer", "bias", *_PARTS)),
    Row(
        _MIXER + "conv1d.weight",
        "i 1 n -> n i",
        parts("mixer/convolutions", "weight", *CONVOLVED),
        join=1,
    ),
    Row(_MIXER + "conv1d.bias", "i -> i", parts("mixer/convolutions", "bias", *CONVOLVED)),
    Row(_MIXER + "dt_bias", "h -> h", ("mixer/delta_bias",)),
    Row(_MIXER + "A_log", "h -> h", ("mixer/log_rate",)),
    Row(_MIXER + "D", "h -> h", ("mixer/skip",)),
    Row(_MIXER + "norm.weight", "i -> i", ("mixer/norm_scale",)),
)

_INITIAL = "an initial weight, which the checkpoint replaces"
_AUTHORS = "the authors' own name; transformers reads another one"
_UNUSED = {
    "time_step_floor": _INITIAL,
    "rescale_prenorm_residual": _INITIAL,
    "residual_in_fp32": "precision: the Decoder's dtype decides",
    **dict.fromkeys(("d_model", "d_inner", "n_layer", "ssm_cfg"), _AUTHORS),
    "pad_vocab_size_multiple": "vocab_size is already padded",
}
_MAMBA_UNUSED = {
    **_UNUSED,
    "time_step_scale": _INITIAL,
    "time_step_init_scheme": _INITIAL,
    "use_mambapy": "computes the same function in another way",
    "use_associative_scan": "computes the same function in another way",
    "rms_norm": _AUTHORS,
}
_MAMBA2_UNUSED = {
    **_UNUSED,
    "time_step_rank": "of Mamba; Mamba-2 has none",
    "chunk_size": "computes the same function in chunks of another size",
    "intermediate_size": "transformers derives it from expand",
}

MAMBAS = (
    Family(
        "MambaForCausalLM",
        "mamba",
        _read_mamba,
        _write_mamba,
        _MAMBA_ROWS,
        "backbone.",
        ignored=(),
        unused=_MAMBA_UNUSED,
    ),
    Family(
        "Mamba2ForCausalLM",
        "mamba2",
        _read_mamba2,
        _write_mamba2,
        _MAMBA2_ROWS,
        "backbone.",
        ignored=(),
        unused=_MAMBA2_UNUSED,
    ),
)
