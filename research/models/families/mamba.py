"""Mamba and Mamba-2: a stack of mixers without feed-forward layers."""

from collections.abc import Mapping
from typing import Any

from layers.decoder import DecoderConfig
from layers.mamba import MambaConfig
from layers.mamba2 import CONVOLVED
from research.models.families.family import Family, parts, supported
from research.models.table import Row

_ANY_STEP = [0.0, float("inf")]


def _read(hf: Mapping[str, Any], kind: str, tied: bool, **sizes: Any) -> DecoderConfig:
    """``kind`` and ``sizes`` are the mixer's; ``tied`` is the default of tie_word_embeddings."""
    supported(hf, hidden_act="silu")
    return DecoderConfig(
        vocab_size=hf["vocab_size"],
        width=hf["hidden_size"],
        num_layers=hf["num_hidden_layers"],
        mamba=MambaConfig(
            expand=hf.get("expand", 2),
            convolution=hf.get("conv_kernel", 4),
            bias=bool(hf.get("use_bias", False)),
            convolution_bias=bool(hf.get("use_conv_bias", True)),
            delta_min=float(hf.get("time_step_min", 0.001)),
            delta_max=float(hf.get("time_step_max", 0.1)),
            **sizes,
        ),
        pattern=(kind,),
        feed_forward=("none",),
        position="none",
        norm_eps=float(hf.get("layer_norm_epsilon", 1e-5)),
        tie_embeddings=bool(hf.get("tie_word_embeddings", tied)),
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


def _read_mamba(hf: Mapping[str, Any]) -> DecoderConfig:
    width, rank = hf["hidden_size"], hf.get("time_step_rank", "auto")
    inner = hf.get("expand", 2) * width
    supported(hf, intermediate_size=inner)
    rank = MambaConfig().rank(width) if rank == "auto" else rank
    return _read(hf, "mamba", True, state=hf.get("state_size", 16), delta_rank=rank)


def _write_mamba(config: DecoderConfig) -> dict[str, Any]:
    mamba = config.part("mamba")
    return {
        **_write(config),
        "intermediate_size": mamba.expand * config.width,
        "time_step_rank": mamba.rank(config.width),
    }


def _read_mamba2(hf: Mapping[str, Any]) -> DecoderConfig:
    # JSON has no infinity: transformers ≥ 5 writes {"__float__": "Infinity"}
    limit = [
        float(step["__float__"] if isinstance(step, Mapping) else step)
        for step in hf.get("time_step_limit", _ANY_STEP)
    ]
    supported({"time_step_limit": limit}, time_step_limit=_ANY_STEP)
    supported(hf, rms_norm=True)
    config = _read(
        hf,
        "mamba2",
        False,
        state=hf.get("state_size", 128),
        head_dim=hf.get("head_dim", 64),
        groups=hf.get("n_groups", 8),
    )
    supported(hf, num_heads=config.part("mamba").heads(config.width))
    return config


def _write_mamba2(config: DecoderConfig) -> dict[str, Any]:
    mamba = config.part("mamba")
    heads = {"num_heads": mamba.heads(config.width), "head_dim": mamba.head_dim}
    return {**_write(config), **heads, "n_groups": mamba.groups}


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

MAMBAS = (
    Family(
        "MambaForCausalLM", "mamba", _read_mamba, _write_mamba, _MAMBA_ROWS, "backbone.", ignored=()
    ),
    Family(
        "Mamba2ForCausalLM",
        "mamba2",
        _read_mamba2,
        _write_mamba2,
        _MAMBA2_ROWS,
        "backbone.",
        ignored=(),
    ),
)
