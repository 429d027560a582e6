"""RWKV-4, as transformers keeps it."""

from collections.abc import Mapping
from typing import Any

from layers.decoder import DecoderConfig
from layers.mlp import MlpConfig
from layers.rwkv import RwkvConfig
from research.models.families.family import Family, affine, supported
from research.models.table import Row


def _read_rwkv(hf: Mapping[str, Any]) -> DecoderConfig:
    width = hf["hidden_size"]
    # transformers' last norm has this ε whatever the others have
    supported(hf, layer_norm_epsilon=1e-5)
    if hf.get("attention_hidden_size") is not None:
        supported(hf, attention_hidden_size=width)
    return DecoderConfig(
        vocab_size=hf["vocab_size"],
        width=width,
        num_layers=hf["num_hidden_layers"],
        mlp=MlpConfig(hf.get("intermediate_size") or 4 * width),
        rwkv=RwkvConfig(),
        pattern=("rwkv4",),
        feed_forward=("rwkv4",),
        position="none",
        norm="layernorm",
        norm_eps=1e-5,
        norm_bias=True,
        embedding_norm=True,
        tie_embeddings=bool(hf.get("tie_word_embeddings", False)),
        max_length=hf.get("context_length"),
    )


def _write_rwkv(config: DecoderConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "attention_hidden_size": config.width,
        "num_hidden_layers": config.num_layers,
        "intermediate_size": config.part("mlp").width,
        "layer_norm_epsilon": config.norm_eps,
        # halving activations every few layers is for float16; norms undo it but for their ε
        "rescale_every": 0,
        "tie_word_embeddings": config.tie_embeddings,
        "context_length": config.max_length or 1024,
    }


_BLOCK = "rwkv.blocks.{l}."
_RWKV_ROWS = (
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

RWKVS = (
    Family("RwkvForCausalLM", "rwkv", _read_rwkv, _write_rwkv, _RWKV_ROWS, "rwkv.", ignored=()),
)
