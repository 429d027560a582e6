"""Mamba: a stack of mixers and nothing between them."""

from collections.abc import Mapping
from typing import Any

from layers.config import check
from layers.decoder import DecoderConfig
from layers.mamba import MambaConfig
from research.models.families.family import Family, parts, supported
from research.models.table import Row


def _read_mamba(hf: Mapping[str, Any]) -> DecoderConfig:
    supported(hf, hidden_act="silu")
    width, expand = hf["hidden_size"], hf.get("expand", 2)
    inner = hf.get("intermediate_size", expand * width)
    check(inner == expand * width, "intermediate_size", inner, f"must be {expand * width}")
    rank = hf.get("time_step_rank", "auto")
    return DecoderConfig(
        vocab_size=hf["vocab_size"],
        width=width,
        num_layers=hf["num_hidden_layers"],
        mamba=MambaConfig(
            state=hf.get("state_size", 16),
            expand=expand,
            convolution=hf.get("conv_kernel", 4),
            bias=bool(hf.get("use_bias", False)),
            convolution_bias=bool(hf.get("use_conv_bias", True)),
            delta_min=float(hf.get("time_step_min", 0.001)),
            delta_max=float(hf.get("time_step_max", 0.1)),
            delta_rank=MambaConfig().rank(width) if rank == "auto" else rank,
        ),
        pattern=("mamba",),
        feed_forward=("none",),
        position="none",
        norm_eps=float(hf.get("layer_norm_epsilon", 1e-5)),
        tie_embeddings=bool(hf.get("tie_word_embeddings", True)),
    )


def _write_mamba(config: DecoderConfig) -> dict[str, Any]:
    mamba = config.part("mamba")
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.num_layers,
        "state_size": mamba.state,
        "expand": mamba.expand,
        "intermediate_size": mamba.expand * config.width,
        "conv_kernel": mamba.convolution,
        "use_bias": mamba.bias,
        "use_conv_bias": mamba.convolution_bias,
        "time_step_min": mamba.delta_min,
        "time_step_max": mamba.delta_max,
        "time_step_rank": mamba.rank(config.width),
        "hidden_act": "silu",
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
    }


_MIXER = "backbone.layers.{l}.mixer."
_MODEL_ROWS = (
    Row("backbone.embeddings.weight", "v d -> v d", ("embedding/table",)),
    Row("backbone.norm_f.weight", "d -> d", ("final_norm/scale",)),
    Row("lm_head.weight", "v d -> d v", ("head/weight",)),
    Row("backbone.layers.{l}.norm.weight", "d -> d", ("mixer_norm/scale",)),
    Row(_MIXER + "conv1d.weight", "i 1 n -> n i", ("mixer/convolution/weight",)),
    Row(_MIXER + "conv1d.bias", "i -> i", ("mixer/convolution/bias",)),
    Row(_MIXER + "out_proj.weight", "d i -> i d", ("mixer/out/weight",)),
    Row(_MIXER + "out_proj.bias", "d -> d", ("mixer/out/bias",)),
)
_MAMBA_ROWS = (
    *_MODEL_ROWS,
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

MAMBAS = (
    Family(
        "MambaForCausalLM", "mamba", _read_mamba, _write_mamba, _MAMBA_ROWS, "backbone.", ignored=()
    ),
)
