"""Mamba-1 and Mamba-2 against transformers' mixers and NumPy in float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.config import ConfigError
from layers.context import Context
from layers.decoder import Decoder, DecoderConfig
from layers.mamba import SELECTIVE, Mamba, MambaConfig
from layers.mamba2 import CONVOLVED, Mamba2
from layers.weights import flat

B, T, D, N, RANK, TAPS = 2, 9, 8, 3, 2, 4
INNER = 2 * D
X = np.random.default_rng(0).normal(size=(B, T, D)).astype(np.float32)
POSITIONS = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
MAMBA2 = MambaConfig(N, head_dim=4, groups=2, bias=True)


def moved(make):
    """Away from the zeros and ones of initial weights."""

    @jax.jit
    def build():
        model = make()
        keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(model))))
        return jax.tree.map(lambda a: a + 0.3 * jax.random.normal(next(keys), a.shape), model)

    return build()


def cut(array, names, sizes, suffix):
    """The rows of a fused tensor, transposed, by our paths."""
    rows = np.split(array, np.cumsum(sizes)[:-1])
    return {f"{name}/{suffix}": part.T for name, part in zip(names, rows, strict=True)}


def as_ours(held):
    """Their tensors (or gradients), by name, in our layout and by our paths."""
    found = {
        "log_rate": held["A_log"], "skip": held["D"],
        "out/weight": held["out_proj.weight"].T,
    }  # fmt: skip
    if "x_proj.weight" in held:
        into = (("into", "gate"), (INNER, INNER))
        found |= cut(held["x_proj.weight"], ("delta_down", "b", "c"), (RANK, N, N), "weight")
        found |= {"delta_up/weight": held["dt_proj.weight"].T, "delta_bias": held["dt_proj.bias"]}
        taps = {"weight": held["conv1d.weight"][:, 0].T, "bias": held["conv1d.bias"]}
        found |= {f"convolution/{name}": value for name, value in taps.items()}
    else:
        group = MAMBA2.groups * N
        sizes = (INNER, INNER, group, group, MAMBA2.heads(D))
        into = (("gate", *CONVOLVED, "delta"), sizes)
        for suffix, value in (
            ("weight", held["conv1d.weight"][:, 0]),
            ("bias", held["conv1d.bias"]),
        ):
            names = [f"convolutions/{name}" for name in CONVOLVED]
            found |= cut(value, names, (INNER, group, group), suffix)
        found |= {"delta_bias": held["dt_bias"], "norm_scale": held["norm.weight"]}
    for suffix in ("weight", "bias"):
        if f"in_proj.{suffix}" in held:
            found |= cut(held[f"in_proj.{suffix}"], *into, suffix)
    if "out_proj.bias" in held:
        found["out/bias"] = held["out_proj.bias"]
    return found


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_values_and_gradients_of_transformers(kind):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = dict(hidden_size=D, state_size=N, conv_kernel=TAPS, num_hidden_layers=1)
    if kind == "mamba":
        from transformers.models.mamba.modeling_mamba import MambaMixer as Mixer

        theirs = Mixer(transformers.MambaConfig(**sizes, time_step_rank=RANK), 0)
        ours = Mamba(MambaConfig(N, delta_rank=RANK), D, rngs=nnx.Rngs(0))
    else:
        from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer as Mixer

        own = dict(num_heads=4, head_dim=4, n_groups=2, use_bias=True, layer_norm_epsilon=0.1)
        theirs = Mixer(transformers.Mamba2Config(**sizes, **own), 0)
        ours = Mamba2(MAMBA2, D, rngs=nnx.Rngs(0), norm_eps=0.1)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    x = torch.tensor(X, requires_grad=True)
    want = theirs(x)
    torch.sin(want).sum().backward()
    named = dict(theirs.named_parameters())
    weights = as_ours({name: p.detach().numpy() for name, p in named.items()})
    assert weights.keys() == flat(ours).keys()
    leaves = [jnp.array(weights[path]) for path in flat(ours)]
    ours = jax.tree.unflatten(jax.tree.structure(ours), leaves)

    def loss(mixer, x):
        y, _ = mixer(x, Context.of_tokens(POSITIONS))
        return jnp.sum(jnp.sin(y)), y

    (_, y), (gradients, dx) = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(ours, X)
    np.testing.assert_allclose(y, want.detach(), atol=1e-5)
    np.testing.assert_allclose(dx, x.grad, atol=2e-5)
    wanted = as_ours({name: p.grad.numpy() for name, p in named.items()})
    for path, gradient in flat(gradients).items():
        atol = 1e-5 * max(1, np.abs(wanted[path]).max())
        np.testing.assert_allclose(gradient, wanted[path], atol=atol, err_msg=path)


def silu(x):
    return x / (1 + np.exp(-x))


def around_the_scan(mixer):
    """Float64: the convolved input, the gate and the parameters by path."""
    held = {path: np.asarray(leaf, np.float64) for path, leaf in flat(mixer).items()}
    into, z = (X.astype(np.float64) @ held[f"{name}/weight"] for name in ("into", "gate"))
    padded = np.pad(into, ((0, 0), (TAPS - 1, 0), (0, 0)))
    taps = held["convolution/weight"]
    x = sum(padded[:, i : i + T] * taps[i] for i in range(TAPS)) + held["convolution/bias"]
    return silu(x), z, held


@jax.jit
def run(mixer):
    return mixer(X, Context.of_tokens(POSITIONS))[0]


@pytest.mark.parametrize(
    "selective", [s for n in range(4) for s in itertools.combinations(SELECTIVE, n)]
)
def test_what_is_selective_follows_the_token_and_the_rest_is_the_same_for_all(selective):
    """Algorithms 1 and 2 of the paper and everything between them, token by token."""
    config = MambaConfig(N, convolution=TAPS, delta_rank=RANK, selective=selective)
    mixer = moved(lambda: Mamba(config, D, rngs=nnx.Rngs(0)))
    x, z, held = around_the_scan(mixer)
    a = -np.exp(held["log_rate"])
    state, y = np.zeros((B, INNER, N)), np.zeros((B, T, INNER))
    for t in range(T):
        delta = np.zeros((B, INNER))
        if "delta" in selective:
            delta = x[:, t] @ held["delta_down/weight"] @ held["delta_up/weight"]
        delta = np.logaddexp(0, delta + held["delta_bias"])[..., None]
        b, c = (
            (x[:, t] @ held[f"{name}/weight"])[:, None] if name in selective else held[name]
            for name in ("b", "c")
        )
        state = np.exp(delta * a) * state + delta * b * x[:, t, :, None]
        y[:, t] = np.sum(state * c, -1) + held["skip"] * x[:, t]
    want = (y * silu(z)) @ held["out/weight"]
    np.testing.assert_allclose(run(mixer), want, atol=1e-5 * np.abs(want).max())


def test_nothing_selective_is_a_causal_convolution():
    """With the kernel ``C·exp(ΔA)^k·ΔB`` of each channel (2312.00752, eq. 3b)."""
    config = MambaConfig(N, convolution=TAPS, delta_rank=RANK, selective=())
    mixer = moved(lambda: Mamba(config, D, rngs=nnx.Rngs(0)))
    x, z, held = around_the_scan(mixer)
    delta = np.logaddexp(0, held["delta_bias"])[:, None]
    decay = np.exp(-delta * np.exp(held["log_rate"]))
    kernel = [np.sum(held["c"] * decay**k * delta * held["b"], -1) for k in range(T)]
    y = np.stack([sum(kernel[k] * x[:, t - k] for k in range(t + 1)) for t in range(T)], axis=1)
    want = ((y + held["skip"] * x) * silu(z)) @ held["out/weight"]
    np.testing.assert_allclose(run(mixer), want, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("kind", [Mamba, Mamba2])
def test_initial_steps_span_the_range_and_rates_are_the_papers(kind):
    config = MambaConfig(4, head_dim=1, delta_min=0.002, delta_max=0.05)
    mixer = jax.jit(lambda: kind(config, 512, rngs=nnx.Rngs(0)))()
    steps = np.log(jax.nn.softplus(mixer.delta_bias[...]))
    low, high = np.log(0.002), np.log(0.05)
    assert low - 1e-3 <= steps.min() < low + 0.05 and high - 0.05 < steps.max() <= high + 1e-3
    # evenly, on a log scale
    parts = np.array([0.25, 0.5, 0.75])
    np.testing.assert_allclose(np.quantile(steps, parts), low + (high - low) * parts, atol=0.2)
    rates = np.exp(mixer.log_rate[...])
    if kind is Mamba:
        np.testing.assert_allclose(rates, np.broadcast_to([1, 2, 3, 4], (1024, 4)), rtol=1e-6)
    else:
        assert 1 <= rates.min() < 1.5 and 15.5 < rates.max() <= 16
    np.testing.assert_array_equal(mixer.skip[...], 1)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(state=0), "state=0: must be > 0"),
        (dict(convolution=0), "convolution=0: must be > 0"),
        (dict(delta_min=0.2), "delta_max=0.1: must be > delta_min=0.2"),
        (dict(delta_rank=0), "delta_rank=0: must be > 0 or None"),
        (dict(delta_least=-1.0), "delta_least=-1.0: must be ≥ 0"),
        (dict(delta_least=0.5, delta_most=0.1), "delta_most=0.1: must be None or > delta_least"),
        (dict(selective=("b", "dleta")), r"selective\[1\]='dleta': .* \(did you mean 'delta'\?\)"),
        (dict(implementation="xla2"), "implementation='xla2': must be one of"),
    ],
)
def test_a_bad_configuration_names_its_field(changes, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        MambaConfig(**changes)


@pytest.mark.parametrize(
    "kind, changes, message",
    [
        ("mamba2", dict(head_dim=5), "mamba.head_dim=5: must divide expand × width = 16"),
        ("mamba2", dict(head_dim=4, groups=3), "mamba.groups=3: must divide the 4 heads"),
        ("mamba2", dict(head_dim=4, selective=("b",)), r"mamba.selective=\('b',\): must be all"),
        ("mamba", dict(delta_most=0.1), "mamba.delta_most=0.1: requires a 'mamba2' layer"),
        ("mamba", dict(delta_least=0.1), "mamba.delta_least=0.1: requires a 'mamba2' layer"),
        ("mamba", None, "mamba=None: is required by 'mamba' layers"),
    ],
)
def test_a_model_that_cannot_be(kind, changes, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        config = DecoderConfig(
            11, D, 1, pattern=(kind,), feed_forward=("none",), position="none",
            mamba=None if changes is None else MambaConfig(**changes),
        )  # fmt: skip
        jax.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
