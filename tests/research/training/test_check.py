"""A run and the plan of it refuse the same mistakes with the same words."""

import dataclasses

import jax
import pytest
from flax import nnx

from layers.attention import AttentionConfig
from layers.config import ConfigError
from layers.decoder import Decoder, DecoderConfig
from layers.mlp import MlpConfig
from research.data import DataConfig, SyntheticConfig
from research.parallel import MeshConfig
from research.planning.step import Setup, check_setup
from research.training import OptimizerConfig, TrainingConfig, train

MODEL = DecoderConfig(
    vocab_size=16, width=8, num_layers=2, attention=AttentionConfig(num_heads=2), mlp=MlpConfig(16)
)
DATA = DataConfig(
    source="synthetic",
    sequence_length=8,
    batch_size=2,
    synthetic=SyntheticConfig(task="copy", vocab_size=16),
)


def refusal(call, *arguments, **options) -> str:
    with pytest.raises(ConfigError) as caught:
        call(*arguments, **options)
    return str(caught.value)


def setup(model, training, mesh, topology="v5e:1x1"):
    sizes = DATA.batch_size, DATA.sequence_length
    return Setup(model, topology, mesh, *sizes, training, DATA.synthetic.vocab_size)


@pytest.mark.tpu_compile
@pytest.mark.parametrize(
    "model, training, mesh, message",
    [
        (
            dict(vocab_size=15), {}, {},
            "model.vocab_size=15: must be at least the vocabulary of the data, 16",
        ),
        (
            dict(position="learned", max_length=7), {}, {},
            "data.sequence_length=8: must be at most model.max_length=7",
        ),
        (dict(microbatches=2), {}, {}, "microbatches=2: changes nothing: mesh.stage=1"),
        (
            {}, dict(gradient_accumulation=3), {},
            "training.gradient_accumulation=3: must divide the 2 rows of a device",
        ),
        (
            {}, dict(optimizer=OptimizerConfig(master=False)), {},
            "training.optimizer.master=False: changes nothing: the trained parameters are float32",
        ),
        ({}, {}, dict(zero=2), "mesh.zero=2: changes nothing: mesh.fsdp=1"),
        (
            dict(dtype="float16"), {}, {},
            "model.dtype='float16': training does not support it, because gradients underflow: "
            "use bfloat16",
        ),
        (dict(param_dtype="float16"), {}, {}, "model.param_dtype='float16': training does not"),
        ({}, {}, dict(tensor=3), "mesh=data=-1 × tensor=3: 3 must divide the number of devices, 1"),
    ],
)  # fmt: skip
def test_both_refuse(model, training, mesh, message, tmp_path):
    parts = (
        dataclasses.replace(MODEL, **model),
        TrainingConfig(steps=1, eval_batches=0, **training),
        MeshConfig(**mesh),
    )
    said = refusal(train, parts[0], DATA, parts[1], mesh=parts[2], workdir=tmp_path / "run")
    assert said.startswith(message) and "\n" not in said
    assert not (tmp_path / "run").exists()
    assert refusal(check_setup, setup(*parts)) == said


@pytest.mark.tpu_compile
def test_rows_that_do_not_divide_over_a_slices_hosts():
    """Each host of eight v5e brings rows of its own, and there are two of them."""
    model = dataclasses.replace(MODEL, attention=AttentionConfig(num_heads=4))
    mesh = MeshConfig(data=1, tensor=4, sequence=2)
    said = refusal(check_setup, setup(model, TrainingConfig(steps=1), mesh, "v5e:2x4"))
    assert said == "mesh.stage×data×fsdp×expert=1: must be a multiple of the 2 processes"


@pytest.mark.tpu_compile
def test_moments_that_the_strategy_does_not_split_are_refused_before_anything_is_written(tmp_path):
    training = TrainingConfig(1, OptimizerConfig("sgd", b1=0.0))
    mesh = MeshConfig(data=1, fsdp=4, zero=1)
    said = refusal(check_setup, setup(MODEL, training, mesh, "v5e:2x2"))
    assert said == "batch_size=2: must be a multiple of mesh.stage×data×fsdp×expert=4"
    large = dataclasses.replace(setup(MODEL, training, mesh, "v5e:2x2"), batch_size=4)
    assert refusal(check_setup, large).startswith("mesh.zero=1: changes nothing: fsdp shards no")
    packed = TrainingConfig(1, OptimizerConfig(moments="8bit"))
    said = refusal(train, MODEL, DATA, packed, workdir=tmp_path / "run")
    assert said.startswith("optimizer.moments='8bit': changes nothing: no weight")
    assert not (tmp_path / "run").exists()


def test_a_start_of_another_configuration_is_refused():
    other = dataclasses.replace(MODEL, vocab_size=15)
    start = jax.eval_shape(lambda: Decoder(other, rngs=nnx.Rngs(0)))
    message = refusal(train, MODEL, DATA, TrainingConfig(steps=1), init=lambda fresh: start)
    assert message == "model.vocab_size=16: init returns a model with 15"
    message = refusal(train, MODEL, DATA, TrainingConfig(steps=1), init=lambda fresh: None)
    assert message == "init='NoneType': must return a Decoder"
