"""Adafactor's second moments against transformers', layer by layer, and where they lie."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from layers.roles import Role
from research.training.factored import Factored, scale_by_factored_rms

SHAPES = {
    "mlp": ((2, 6, 10), ("embed", "mlp"), Role("matrix", (0,), (1,))),
    "query": ((2, 6, 2, 5), ("embed", "heads", "head_dim"), Role("matrix", (0,), (1, 2))),
    "out": ((2, 2, 5, 6), ("heads", "head_dim", "embed"), Role("matrix", (0, 1), (2,))),
    "latent": ((2, 3, 2, 5), (None, "heads", "head_dim"), Role("matrix", (0,), (1, 2))),
    "experts": ((2, 3, 6, 10), ("experts", "embed", "mlp"), Role("matrix", (1,), (2,))),
    "table": ((12, 6), ("vocab", "embed"), Role("embedding", (0,), (1,))),
    "bias": ((2, 2, 5), ("heads", "head_dim"), None),
    "rates": ((2, 6, 4), ("channels", None), None),
    "norm": ((2, 6), ("norm",), None),
}


def arrays(seed):
    rng = np.random.default_rng(seed)
    # of magnitudes that make the clipping bite at times
    return {n: rng.normal(size=s) * 10 ** rng.uniform(-2, 1, s) for n, (s, *_) in SHAPES.items()}


def variables(values):
    def variable(value, axes, role):
        return nnx.Param(jnp.float32(value), axes=axes, role=role)

    return {n: variable(v, *SHAPES[n][1:]) for n, v in values.items()}


def matrices(name, a):
    """What transformers would have as a parameter each."""
    if name in ("bias", "rates", "norm"):
        return [layer.reshape(-1) for layer in a]
    if name == "experts":
        return [expert for layer in a for expert in layer]
    if name == "table":
        return [a]
    return [layer.reshape(-1, 6) if name == "out" else layer.reshape(len(layer), -1) for layer in a]


def test_steps_are_those_of_transformers_for_every_matrix_alone():
    torch = pytest.importorskip("torch")
    adafactor = pytest.importorskip("transformers.optimization").Adafactor
    rate, start = 0.1, arrays(0)
    theirs = {
        n: [torch.nn.Parameter(torch.tensor(m.copy())) for m in matrices(n, v)]
        for n, v in start.items()
    }
    reference = adafactor(
        [p for each in theirs.values() for p in each],
        lr=rate,
        relative_step=False,
        scale_parameter=False,
    )
    optimizer = optax.chain(scale_by_factored_rms(), optax.scale_by_learning_rate(rate))
    ours = variables(start)
    state = optimizer.init(ours)
    update = jax.jit(optimizer.update)
    for step in range(1, 6):
        gradients = arrays(step)
        updates, state = update(variables(gradients), state)
        ours = optax.apply_updates(ours, updates)
        for name, each in theirs.items():
            for parameter, gradient in zip(each, matrices(name, gradients[name]), strict=True):
                parameter.grad = torch.tensor(gradient.copy())
        reference.step()
    for name, each in theirs.items():
        want = np.concatenate([p.detach().numpy().ravel() for p in each])
        np.testing.assert_allclose(ours[name][...].ravel(), want, atol=2e-5, err_msg=name)


def test_a_matrix_has_two_vectors_and_a_vector_itself():
    state = scale_by_factored_rms().init(variables(arrays(0)))
    shapes = {n: jax.tree.map(jnp.shape, v.get_value()) for n, v in state.moments.items()}
    assert shapes == {
        "mlp": Factored((2, 6, 1), (2, 1, 10)),
        "query": Factored((2, 6, 1, 1), (2, 1, 2, 5)),
        "out": Factored((2, 2, 5, 1), (2, 1, 1, 6)),
        "latent": Factored((2, 3, 1, 1), (2, 1, 2, 5)),
        "experts": Factored((2, 3, 6, 1), (2, 3, 1, 10)),
        "table": Factored((12, 1), (1, 6)),
        "bias": (2, 2, 5),
        "rates": (2, 6, 4),
        "norm": (2, 6),
    }


SHARDED = """
import jax, numpy as np
from layers.attention import AttentionConfig
from layers.decoder import DecoderConfig
from layers.mlp import MlpConfig
from research.data import DataConfig, SyntheticConfig
from research.parallel import MeshConfig, make_mesh
from research.training import OptimizerConfig, TrainingConfig, train
from research.training.optimizers import make_optimizer
from research.training.state import abstract_state

MODEL = DecoderConfig(vocab_size=64, width=32, num_layers=3, mlp=MlpConfig(64, bias=True),
                      attention=AttentionConfig(num_heads=4, qkv_bias=True))
DATA = DataConfig(source="synthetic", sequence_length=16, batch_size=8,
                  synthetic=SyntheticConfig(task="copy", vocab_size=64))
TRAINING = TrainingConfig(3, OptimizerConfig("adafactor", learning_rate=1e-2), eval_batches=0)


def losses(mesh, devices=None):
    seen = []
    result = train(MODEL, DATA, TRAINING, mesh=mesh, devices=devices,
                   progress=lambda step, steps, metrics: seen.append(metrics["loss"]))
    return [*seen[1:], result.metrics["loss"], result.metrics["gradient_norm"]]


want = losses(MeshConfig(data=1), jax.devices()[:1])
for config in (MeshConfig(data=1, fsdp=8, zero=1), MeshConfig(data=2, fsdp=2, tensor=2)):
    np.testing.assert_allclose(losses(config), want, rtol=2e-5, err_msg=str(config))
    mesh = make_mesh(config)
    optimizer = make_optimizer(TRAINING.optimizer, 3)
    state = abstract_state(MODEL, optimizer, mesh, config.zero_stage).optimizer
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.endswith(("rows", "columns")):
            share = int(np.prod(leaf.sharding.shard_shape(leaf.shape)))
            # embed is 32 long, and split over fsdp
            assert leaf.size == share * (config.fsdp if 32 in leaf.shape else config.tensor), name
print("passed")
"""


def test_they_are_split_as_the_sides_are_and_train_alike(run_script):
    assert run_script(SHARDED).endswith("passed\n")
