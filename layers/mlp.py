"""Feed-forward layers: plain (GELU, ReLU) and gated (SwiGLU, GeGLU; Shazeer 2020, eq. 6)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from layers.config import check, check_choice, check_types
from layers.context import Context
from layers.linear import Linear, fan_in_normal
from layers.state import CONTIGUOUS, CacheConfig


def _gelu_tanh(x):
    return jax.nn.gelu(x, approximate=True)


def _gelu(x):
    return jax.nn.gelu(x, approximate=False)


# name → (activation, gated)
ACTIVATIONS = {
    "gelu": (_gelu, False),
    "gelu_tanh": (_gelu_tanh, False),
    "relu": (jax.nn.relu, False),
    "swiglu": (jax.nn.silu, True),
    "geglu": (_gelu, True),
    "geglu_tanh": (_gelu_tanh, True),
}


@dataclasses.dataclass(frozen=True)
class MlpConfig:
    """``width`` is the hidden size ``f``; ``activation`` one of `ACTIVATIONS`."""

    width: int
    activation: str = "swiglu"
    bias: bool = False

    def __post_init__(self):
        check_types(self)
        check(self.width > 0, "width", self.width, "must be > 0")
        check_choice("activation", self.activation, ACTIVATIONS)


class Mlp(nnx.Module):
    """``down(act(up(x)))`` or, gated, ``down(act(gate(x)) · up(x))`` (Shazeer 2020)."""

    def __init__(
        self,
        config: MlpConfig,
        width: int,
        *,
        rngs: nnx.Rngs,
        out_scale: float = 1.0,
        dtype: jnp.dtype = jnp.float32,
        param_dtype: jnp.dtype = jnp.float32,
    ):
        self.activation = config.activation
        dtypes: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype)

        def into_hidden():
            return Linear(
                "btd,df->btf",
                (width, config.width),
                ("embed", "mlp"),
                ("batch", "time", "mlp"),
                rngs=rngs,
                bias=config.bias,
                **dtypes,
            )

        self.gate = into_hidden() if ACTIVATIONS[config.activation][1] else None
        self.up = into_hidden()
        self.down = Linear(
            "btf,fd->btd",
            (config.width, width),
            ("mlp", "embed"),
            ("batch", "time", None),
            rngs=rngs,
            bias=config.bias,
            init=fan_in_normal(out_scale),
            **dtypes,
        )

    def init_state(self, batch: int, max_length: int, cache: CacheConfig = CONTIGUOUS) -> None:
        """None: this layer has no state."""

    def __call__(self, x_btd: jax.Array, context: Context) -> tuple[jax.Array, Context]:
        """The layer applied to each token separately; the context is unchanged."""
        activation, _ = ACTIVATIONS[self.activation]
        h_btf = self.up(x_btd)
        h_btf = activation(h_btf) if self.gate is None else activation(self.gate(x_btd)) * h_btf
        return self.down(context.tap("mlp.hidden", h_btf)), context
