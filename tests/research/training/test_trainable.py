"""Training a part of a model: the rest has no moments, is no part of a checkpoint, and is there."""

import dataclasses
import shutil
import signal

import jax
import numpy as np
import pytest
from flax import nnx

from layers.config import ConfigError
from layers.decoder import Decoder
from layers.routing import MoeConfig
from layers.stack import unstacked
from layers.weights import flat
from research.training import Preempted, TrainingConfig, load_model, train
from research.training.checkpoint import Checkpoints
from research.training.optimizers import make_optimizer
from research.training.state import TrainState
from research.training.step import make_step
from research.training.trainable import check_patterns
from tests.research.training.test_resume import DATA, MODEL, assert_same, quiet

TRAINING = TrainingConfig(steps=6, checkpoint_every=2, log_every=1, keep=2)
PATTERNS = ("*/mixer/*/weight", "final_norm/*")


def is_trained(path: str) -> bool:
    return "/mixer/" in path or path.startswith("final_norm/")


def run(workdir, **options):
    options = {"trainable": PATTERNS, "progress": quiet, **options}
    return train(MODEL, DATA, TRAINING, workdir=workdir, **options)


def stop_at(step):
    def stop(done, steps, metrics):
        if done == step:
            signal.raise_signal(signal.SIGTERM)

    return stop


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finished")
    return workdir, run(workdir).model


def test_only_what_is_named_changes(finished):
    fresh = jax.jit(lambda: Decoder(MODEL, rngs=nnx.Rngs(jax.random.key(0))))()
    before, after = flat(fresh), flat(finished[1])
    assert {is_trained(path) for path in before} == {True, False}
    for path in before:
        same = np.array_equal(before[path], after[path])
        assert same != is_trained(path), path


def test_only_what_is_named_has_gradients_and_moments():
    """AdamW keeps two numbers for each number that it trains, and none for another."""
    model = jax.jit(lambda: Decoder(MODEL, rngs=nnx.Rngs(0)))()
    optimizer = make_optimizer(TRAINING.optimizer, TRAINING.steps)
    state = TrainState.begin(model, optimizer, 0, PATTERNS)
    trained = sum(array.nbytes for path, array in flat(model).items() if is_trained(path))
    held = sum(a.nbytes for a in jax.tree.leaves(state.optimizer) if a.ndim > 0)
    assert held == 2 * trained < 2 * sum(a.nbytes for a in flat(model).values()) / 2
    # the compiled step holds no more than parameters, moments and the gradients of these
    step = make_step(TRAINING, patterns=PATTERNS)
    batch = {name: jax.ShapeDtypeStruct((8, 32), "int32")
             for name in ("tokens", "targets", "positions", "segment_ids")}  # fmt: skip
    batch["weights"] = jax.ShapeDtypeStruct((8, 32), "float32")
    out, _ = jax.eval_shape(step, state, batch)
    assert jax.tree.structure(out) == jax.tree.structure(state)


def test_a_checkpoint_holds_what_is_trained_and_the_rest_lies_beside_it(finished):
    workdir, model = finished
    held = {}
    for name, step in (("checkpoints", 6), ("fixed", 0)):
        checkpoints = Checkpoints(workdir / name, keep=2)
        tree = checkpoints._manager.item_metadata(step)["state"].tree
        checkpoints.close()
        held[name] = {
            path[len("model/") : -len("/value")] for path in tree if path.startswith("model/")
        }
    paths = set(flat(model))
    assert held["checkpoints"] == {path for path in paths if is_trained(path)}
    assert held["fixed"] == {path for path in paths if not is_trained(path)}


def test_a_run_of_a_part_resumes_bit_for_bit(finished, tmp_path):
    def init(model):
        calls.append(1)
        return model

    calls = []
    with pytest.raises(Preempted):
        run(tmp_path / "run", progress=stop_at(3), init=init)
    run(tmp_path / "run", init=init)
    assert_same(tmp_path / "run", finished[0])
    assert len(calls) == 1  # what is not trained came from the disk


def test_the_whole_model_is_loaded(finished):
    workdir, model = finished
    loaded = load_model(workdir)
    for a, b in zip(*map(jax.tree.leaves, (loaded, model)), strict=True):
        np.testing.assert_array_equal(a, b)
    other = load_model(workdir, model=dataclasses.replace(MODEL, scan=False))
    for a, b in zip(*map(jax.tree.leaves, (other, unstacked(model))), strict=True):
        np.testing.assert_array_equal(a, b)


def test_what_is_not_trained_must_be_there(finished, tmp_path):
    copy = shutil.copytree(finished[0], tmp_path / "copy")
    shutil.rmtree(copy / "fixed")
    with pytest.raises(ConfigError, match="copy/fixed'?: the parameters that are not trained"):
        load_model(copy)


@pytest.mark.parametrize(
    "patterns, message",
    [
        (("*/mixer/*", "head/*"), "trainable='head/\\*': matches no parameter of the model"),
        ((), "trainable=\\(\\): must name at least one pattern"),
    ],
)
def test_patterns_that_match_nothing_are_refused(patterns, message):
    with pytest.raises(ConfigError, match=message):
        run(None, trainable=patterns)


def test_a_pattern_may_match_across_slashes():
    model = jax.eval_shape(lambda: Decoder(MODEL, rngs=nnx.Rngs(0)))
    check_patterns(model, ("*weight",))


def test_a_start_without_a_checkpoint_leaves_nothing_behind(tmp_path):
    """What is not trained is that of the start whose checkpoints there are."""

    def stop(step, steps, metrics):
        raise KeyboardInterrupt  # before the first checkpoint

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, progress=stop)
    model = run(tmp_path, init=lambda fresh: jax.tree.map(lambda a: a + 1, fresh)).model
    for a, b in zip(*map(jax.tree.leaves, (load_model(tmp_path), model)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_router_that_is_not_trained_keeps_its_biases(tmp_path):
    """Loads move biases without a gradient; what is saved once must not move."""
    moe = MoeConfig(4, 16, router="sigmoid", bias_rate=0.1)
    model = dataclasses.replace(MODEL, mlp=None, feed_forward=("moe",), moe=moe)
    biases = {}
    for pattern in ("*/mixer/*", "*"):
        options = dict(trainable=(pattern,), progress=quiet, workdir=tmp_path / str(len(pattern)))
        trained = train(model, DATA, TRAINING, **options).model
        biases[pattern] = np.asarray(trained.mixtures[0].bias[...])
        loaded = load_model(options["workdir"])
        np.testing.assert_array_equal(loaded.mixtures[0].bias[...], biases[pattern])
    assert not np.any(biases["*/mixer/*"]) and np.any(biases["*"])


def test_another_choice_is_another_run(finished):
    with pytest.raises(ConfigError, match="trainable=.*: workdir .* was begun with"):
        run(finished[0], trainable=("*",))


def test_a_run_goes_on_with_the_layers_unrolled(tmp_path):
    """The layout of layers may change between starts: moments and weights are rearranged."""
    whole = run(tmp_path / "whole", trainable=("*",)).model
    with pytest.raises(Preempted):
        run(tmp_path / "run", trainable=("*",), progress=stop_at(3))
    model = dataclasses.replace(MODEL, scan=False)
    unrolled = train(model, DATA, TRAINING, workdir=tmp_path / "run", progress=quiet).model
    for a, b in zip(*map(jax.tree.leaves, (unrolled, unstacked(whole))), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    back = load_model(tmp_path / "run")
    assert back.config.scan  # as the run was begun
    for a, b in zip(*map(jax.tree.leaves, (unstacked(back), unrolled)), strict=True):
        np.testing.assert_array_equal(a, b)


MESHES = """
import sys
from pathlib import Path
import jax, numpy as np
from research.parallel import MeshConfig
from research.training import TrainingConfig, load_model, train, Preempted
from tests.research.training.test_resume import DATA, MODEL, quiet
from tests.research.training.test_trainable import PATTERNS, stop_at

workdir = Path(sys.argv[1])
training = TrainingConfig(steps=4, gradient_accumulation=2)
def run(devices, name=None, progress=quiet, **mesh):
    return train(MODEL, DATA, training, trainable=PATTERNS, progress=progress,
                 workdir=None if name is None else workdir / name,
                 mesh=MeshConfig(**mesh), devices=jax.devices()[:devices])
def same(a, b, atol=2e-5):
    for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True):
        np.testing.assert_allclose(jax.device_get(x), jax.device_get(y), atol=atol)
alone = run(1).model
same(run(4, data=2, fsdp=2, zero=1).model, alone)
# begun on one mesh, and gone on with on another
try:
    run(4, "run", stop_at(2), data=1, fsdp=4)
except Preempted:
    pass
other = run(8, "run", data=2, fsdp=2, tensor=2).model
same(other, alone)
same(load_model(workdir / "run", MeshConfig(data=1, fsdp=8)), other, 0)
print("passed")
"""


def test_a_part_is_trained_on_any_mesh(run_script, tmp_path):
    assert run_script(MESHES, str(tmp_path)).endswith("passed\n")
