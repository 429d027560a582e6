"""The stamp holds what decides whether a program may run here; each difference is named."""

import dataclasses
import importlib.metadata
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from layers.attention import AttentionConfig
from layers.config import ConfigError
from layers.decoder import DecoderConfig
from layers.mlp import MlpConfig
from research.inference.compiled import make_stamp, stamp
from research.inference.compiled.stamp import read_stamp

MODEL = DecoderConfig(
    vocab_size=11, width=8, num_layers=1, scan=False, attention=AttentionConfig(2), mlp=MlpConfig(8)
)


def weights(value=0.0, width=4, dtype=jnp.float32, name="w"):
    return {"a": [{name: jnp.full((8, width), value, dtype)}]}


def stamped(tree=None, model=MODEL):
    return make_stamp(weights() if tree is None else tree, {"model": model}, jax.devices()[:1])


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    (tmp_path / "DIR").mkdir()
    monkeypatch.chdir(tmp_path)


def read(stored, now, portable=False):
    Path("DIR/stamp.json").write_text(json.dumps({**stored, "programs": {}}))
    read_stamp(Path("DIR/stamp.json"), now, {}, portable)


def refusal(stored, now, portable=False):
    with pytest.raises(ConfigError) as caught:
        read(stored, now, portable)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def leaves(value, path=()):
    if isinstance(value, dict):
        for name, item in value.items():
            yield from leaves(item, (*path, name))
    else:
        yield path, value


def test_it_holds_versions_device_flags_configurations_and_weights():
    made = stamped()
    assert made["source"]["weights"] == {"a/0/w": "float32[8,4]"}
    assert made["source"]["model"]["attention"]["num_heads"] == 2
    assert (made["source"]["platform"], made["source"]["devices"]) == ("cpu", 1)
    machine = made["machine"]
    assert machine["jax"] == jax.__version__
    assert machine["jaxlib"] == importlib.metadata.version("jaxlib")
    (line, *_) = [
        line
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith(("flags", "Features"))
    ]
    assert machine["features"] == sorted(line.partition(":")[2].split()) != []


def test_values_of_weights_do_not_count():
    read(stamped(), stamped(weights(1.0)))


def test_every_field_that_differs_is_named_with_both_values():
    now = stamped()
    paths = list(leaves(now))
    assert len(paths) > 30
    for path, here in paths:
        stored = json.loads(json.dumps(now))
        inner = stored
        for name in path[:-1]:
            inner = inner[name]
        there = here + ["other"] if isinstance(here, list) else ["other"]
        inner[path[-1]] = there
        message = refusal(stored, now)
        assert message.startswith(f"{'.'.join(path)}="), message
        assert re.search(r"'DIR' has \[.*'other'\]; compile it again", message), message
        portable = "or load its portable programs" in message
        assert portable == (path[0] == "machine"), message
        if path[0] == "machine":
            read(stored, now, portable=True)
        else:
            assert refusal(stored, now, portable=True) == message
        del inner[path[-1]]
        assert "'DIR' has absent" in refusal(stored, now)


@pytest.mark.parametrize(
    "now, message",
    [
        (lambda: stamped(weights(width=5)),
         "source.weights.a/0/w='float32[8,5]': 'DIR' has 'float32[8,4]'"),
        (lambda: stamped(weights(dtype=jnp.bfloat16)),
         "source.weights.a/0/w='bfloat16[8,4]': 'DIR' has 'float32[8,4]'"),
        (lambda: stamped(weights(name="v")),
         "source.weights.a/0/v='float32[8,4]': 'DIR' has absent"),
        (lambda: stamped({}), "source.weights.a/0/w=absent: 'DIR' has 'float32[8,4]'"),
        (lambda: stamped(model=dataclasses.replace(MODEL, tie_embeddings=False)),
         "source.model.tie_embeddings=False: 'DIR' has True"),
        (lambda: stamped(model=dataclasses.replace(MODEL, norm_eps=1e-5)),
         "source.model.norm_eps=1e-05: 'DIR' has 1e-06"),
    ],
)  # fmt: skip
def test_other_weights_and_other_models_are_refused(now, message):
    assert refusal(stamped(), now()).startswith(f"{message}; compile it again")


def test_another_environment_is_refused(monkeypatch):
    stored = stamped()
    with monkeypatch.context() as patch:
        patch.setenv("XLA_FLAGS", "--b --a")
        assert "machine.flags.XLA_FLAGS=['--a', '--b']: 'DIR' has []" in refusal(stored, stamped())
    with jax.default_matmul_precision("highest"):
        assert "source.matmul_precision='highest': 'DIR' has None" in refusal(stored, stamped())
    with monkeypatch.context() as patch:
        patch.setattr(jax, "__version__", "0.9.9")
        assert "machine.jax='0.9.9': 'DIR' has" in refusal(stored, stamped())


def test_another_processor_is_refused_by_the_features_that_differ(monkeypatch):
    monkeypatch.setattr(stamp, "_features", lambda: ["avx", "fpu", "sse", "sse2"])
    stored = stamped()
    monkeypatch.setattr(stamp, "_features", lambda: ["avx512f", "fpu", "sse", "sse2"])
    message = "machine.features=['avx512f']: 'DIR' has ['avx']; compile it again"
    assert refusal(stored, stamped()).startswith(message)


def test_changed_code_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(stamp, "_CODE", (tmp_path,))
    for name, text in (("blocks.json", "{}"), ("blocks.json", "{ }"), ("a.py", ""), ("a.py", "1")):
        before = stamped()
        (tmp_path / name).write_text(text)
        assert refusal(before, stamped()).startswith("source.code='")


def test_a_sharding_is_part_of_a_weight():
    mesh = jax.sharding.AbstractMesh((2, 1), ("tensor", "data"), (AxisType.Explicit,) * 2)
    sharding = NamedSharding(mesh, PartitionSpec("tensor"))  # type: ignore[arg-type]
    leaf = jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=sharding)
    assert stamp.spell(leaf).startswith("float32[8,4] P")
    assert stamp.spell(leaf).endswith(" over tensor=2")
