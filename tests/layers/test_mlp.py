"""Feed-forward layers against torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers.config import ConfigError
from layers.context import Context
from layers.mlp import ACTIVATIONS, Mlp, MlpConfig


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_value_and_gradient_match_torch(activation, bias, rngs):
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    act = {
        "gelu": functional.gelu,
        "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
        "relu": functional.relu,
        "swiglu": functional.silu,
        "geglu": functional.gelu,
        "geglu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    }[activation]
    mlp = Mlp(MlpConfig(7, activation, bias), 5, rngs=rngs)
    rng = np.random.default_rng(0)
    if bias:  # zero at the start: give them something to add
        for linear in filter(None, (mlp.gate, mlp.up, mlp.down)):
            linear.bias.set_value(jnp.asarray(rng.normal(size=linear.bias.shape), jnp.float32))
    x, cotangent = (rng.normal(size=(2, 3, 5)).astype(np.float32) for _ in range(2))

    tensor = torch.tensor(x.astype(np.float64), requires_grad=True)

    def linear(layer, y):
        y = y @ torch.tensor(np.asarray(layer.weight[...], np.float64))
        return y if layer.bias is None else y + torch.tensor(np.asarray(layer.bias[...]))

    if ACTIVATIONS[activation][1]:
        hidden = act(linear(mlp.gate, tensor)) * linear(mlp.up, tensor)
    else:
        assert mlp.gate is None
        hidden = act(linear(mlp.up, tensor))
    want = linear(mlp.down, hidden)
    want.backward(torch.tensor(cotangent.astype(np.float64)))
    y, back = jax.vjp(lambda x: mlp(x, Context())[0], x)
    np.testing.assert_allclose(y, want.detach().numpy(), atol=2e-6)
    np.testing.assert_allclose(back(cotangent)[0], tensor.grad.numpy(), atol=5e-6)


def test_refuses():
    with pytest.raises(ConfigError, match="^width=0: must be > 0$"):
        MlpConfig(0)
    with pytest.raises(ConfigError, match=r"^activation='swigul': .*did you mean 'swiglu'\?\)$"):
        MlpConfig(4, "swigul")
