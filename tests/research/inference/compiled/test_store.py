"""Loaded programs compute what jit computes, and a folder is whole, the user's own, or refused."""

import dataclasses
import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.compilation_cache import compilation_cache

from layers.attention import AttentionConfig
from layers.config import ConfigError
from layers.decoder import Decoder, DecoderConfig
from layers.mlp import MlpConfig
from research.inference.compiled import Program, load, make_stamp, save
from research.planning.topology import compile_for_tpu, topology_mesh
from tests.conftest import ROOT

MODEL = DecoderConfig(
    vocab_size=11, width=8, num_layers=2, scan=False, attention=AttentionConfig(2), mlp=MlpConfig(8)
)


def step(weights, state, token_b):
    state = {"sum": state["sum"] + weights["w"][token_b], "count": state["count"] + 1}
    return state, jax.lax.top_k(state["sum"] @ weights["w"].T, 2)


def weights(seed=0, width=4):
    return {"w": np.random.default_rng(seed).normal(size=(8, width)).astype(np.float32)}


def state(width=4):
    return {"sum": jnp.zeros((2, width)), "count": jnp.zeros((), jnp.int32)}


def abstract(*trees):
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), trees)


def make(width=4):
    inputs = abstract(weights(width=width), state(width), np.zeros(2, np.int32))
    return {
        "step": Program(jax.jit(step, donate_argnums=1), inputs),
        "clear": Program(jax.jit(lambda state: jax.tree.map(jnp.zeros_like, state)), inputs[1:2]),
    }


def stamp(width=4):
    return make_stamp(weights(width=width), {}, jax.devices()[:1])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder, and the folder of the key with which it was written."""
    home, folder = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("saved") / "DIR"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(home))
        save(make(), folder, stamp())
    return folder, home


@pytest.fixture
def folder(saved, tmp_path, monkeypatch):
    """A copy of the folder, with its key in force."""
    shutil.copytree(saved[0], tmp_path / "DIR")
    monkeypatch.setenv("XDG_DATA_HOME", str(saved[1]))
    return tmp_path / "DIR"


@pytest.fixture
def unpickled(monkeypatch):
    """What is unpickled."""
    contents, loads = [], pickle.loads
    monkeypatch.setattr(pickle, "loads", lambda content: contents.append(content) or loads(content))
    return contents


@pytest.fixture
def compiled():
    """The programs that are compiled from now on, by the seconds that each took."""
    seconds = []

    def listen(event: str, duration_secs: float, **_):
        if "backend_compile" in event:
            seconds.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seconds
    jax.monitoring.unregister_event_duration_listener(listen)


def refusal(folder, **options):
    with pytest.raises(ConfigError) as caught:
        load(make(), folder, stamp(), **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("portable", [False, True])
def test_loaded_programs_compute_what_jit_computes_and_donate_the_state(folder, compiled, portable):
    loaded = load(make(), folder, stamp(), portable=portable)
    assert sorted(loaded) == ["clear", "step"] and len(compiled) == (2 if portable else 0)
    jitted = jax.jit(step)
    token_b = np.array([1, 7], np.int32)
    for seed in (0, 1):
        ours, theirs = state(), state()
        for _ in range(2):
            given = ours
            ours, best = loaded["step"](weights(seed), given, token_b)
            assert given["sum"].is_deleted()
            theirs, expected = jitted(weights(seed), theirs, token_b)
            jax.tree.map(np.testing.assert_array_equal, (ours, best), (theirs, expected))
        assert int(ours["count"]) == 2
    assert not np.any(loaded["clear"](ours)["sum"])


# a model in a process that has never compiled it, with weights that were not there
PROCESS = """
import sys
from pathlib import Path
import jax, numpy as np
from flax import nnx
from research.inference.compiled import load
from tests.research.inference.compiled.test_store import MODEL, Decoder, decoding, model_stamp

seconds = []
jax.monitoring.register_event_duration_secs_listener(
    lambda name, value, **_: seconds.append(value) if "backend_compile" in name else None)
model = jax.tree.map(lambda a: np.load(sys.argv[2])[: a.size].reshape(a.shape),
                     jax.eval_shape(lambda: Decoder(MODEL, rngs=nnx.Rngs(0))))
state = model.init_state(2, 8)
seconds.clear()
decode = load(decoding(model), Path(sys.argv[1]), model_stamp(model))["decode"]
token_b = np.array([3, 5], np.int32)
for position in range(3):
    state, logits_bv = decode(model, state, token_b, np.full(2, position, np.int32))
print(len(seconds), np.asarray(logits_bv).tobytes().hex())
"""


def decoding(model):
    def decode(model, state, token_b, position_b):
        output = model(token_b[:, None], position_b[:, None], state=state)
        return output.state, output.logits_btv[:, 0]

    row = jax.ShapeDtypeStruct((2,), jnp.int32)
    state = jax.eval_shape(lambda: model.init_state(2, 8))
    inputs = (*abstract(model, state), row, row)
    return {"decode": Program(jax.jit(decode, donate_argnums=1), inputs)}


def model_stamp(model):
    return make_stamp(model, {"model": MODEL}, jax.devices()[:1])


def test_another_process_decodes_with_new_weights_and_compiles_nothing(tmp_path):
    abstract_model = jax.eval_shape(lambda: Decoder(MODEL, rngs=nnx.Rngs(0)))
    programs = decoding(abstract_model)
    save(programs, tmp_path / "DIR", model_stamp(abstract_model))
    numbers = np.random.default_rng(1).normal(size=1000).astype(np.float32)
    np.save(tmp_path / "weights.npy", numbers)
    (tmp_path / "script.py").write_text(f"import tests.conftest\n{PROCESS}")
    done = subprocess.run(
        [sys.executable, "script.py", "DIR", "weights.npy"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    count, content = done.stdout.split()
    model = jax.tree.map(lambda a: numbers[: a.size].reshape(a.shape), abstract_model)
    state = model.init_state(2, 8)
    for position in range(3):
        state, logits_bv = programs["decode"].function(
            model, state, np.array([3, 5], np.int32), np.full(2, position, np.int32)
        )
    assert count == "0"
    np.testing.assert_array_equal(
        np.frombuffer(bytes.fromhex(content), np.float32).reshape(2, 11), logits_bv
    )
    assert np.ptp(logits_bv) > 0.1


MESH = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from layers.config import ConfigError
from research.inference.compiled import Program, load, make_stamp, save
from research.parallel import MeshConfig, make_mesh, use_mesh

def programs(mesh):
    def step(w, state, x):
        state = state + x
        return state, jnp.einsum("bd,dv->bv", state, w, out_sharding=P(None, "tensor"))
    def place(shape, *axes):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P(*axes)))
    arguments = (place((3, 8), None, "tensor"), place((2, 3)), place((2, 3)))
    stamp = make_stamp(arguments[0], {}, list(mesh.devices.flat))
    return {"step": Program(jax.jit(step, donate_argnums=1), arguments)}, stamp

def put(mesh, program):
    rng = np.random.default_rng(0)
    return [jax.device_put(rng.normal(size=a.shape).astype(np.float32), a.sharding)
            for a in program.arguments]

folder = Path(sys.argv[1])
mesh = make_mesh(MeshConfig(data=1, tensor=2), jax.devices()[2:4])
made, stamp = programs(mesh)
with use_mesh(mesh):
    save(made, folder, stamp)
    expected = made["step"].function(*put(mesh, made["step"]))
    for portable in (False, True):
        loaded = load(made, folder, stamp, portable=portable)["step"]
        given = put(mesh, made["step"])
        found = loaded(*given)
        assert given[1].is_deleted() and found[1].sharding == expected[1].sharding
        jax.tree.map(np.testing.assert_array_equal, found, expected)
for other in (MeshConfig(data=1, tensor=2), MeshConfig(data=1, fsdp=2), MeshConfig(data=1)):
    elsewhere = make_mesh(other, jax.devices()[: 1 if other == MeshConfig(data=1) else 2])
    with use_mesh(elsewhere):
        try:
            load(*programs(elsewhere)[:1], folder, programs(elsewhere)[1])
        except ConfigError as error:
            print(error)
"""


def test_programs_on_a_mesh_run_on_its_devices_alone(run_script, tmp_path):
    out = run_script(MESH, tmp_path / "DIR").splitlines()
    assert out[0].startswith("machine.ids=[0, 1]: ") and "has [2, 3]; compile it again" in out[0]
    assert out[1].startswith("source.weights.=") and 'has "float32[3,8] P' in out[1]
    assert out[2].startswith("source.devices=1: ") and "has 2; compile it again" in out[2]


# refused


def test_another_stamp_is_refused_before_an_executable_is_read(folder, unpickled):
    for path in folder.glob("*.executable"):
        path.unlink()
    with pytest.raises(ConfigError, match=r"^source.weights.w='float32\[8,5\]': '.*/DIR' has"):
        load(make(5), folder, stamp(5))
    assert unpickled == []


def test_other_programs_and_arguments_are_refused_by_name(folder, unpickled):
    other = make()
    one = {"step": other["step"]}
    with pytest.raises(ConfigError, match=r"^programs.clear=absent: '.*DIR' has '\w{16}'; compile"):
        load(one, folder, stamp())
    other["clear"] = Program(other["clear"].function, abstract(state(5)))
    with pytest.raises(ConfigError, match=r"^programs.clear='\w{16}': '.*' has '\w{16}'"):
        load(other, folder, stamp())
    assert unpickled == []


def truncated(folder, name):
    (folder / name).write_bytes((folder / name).read_bytes()[:-1])
    return "must have"


def tampered(folder, name):
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    return "has another SHA-256"


def swapped(folder, name):
    other = folder / name.replace("step", "clear")
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(other.read_bytes())
    other.write_bytes(content)
    return "must have"


def missing(folder, name):
    (folder / name).unlink()
    return "does not exist"


@pytest.mark.parametrize("kind", ["executable", "portable"])
@pytest.mark.parametrize("spoil", [truncated, tampered, swapped, missing])
def test_a_changed_file_is_refused_by_name(folder, unpickled, spoil, kind):
    message = spoil(folder, f"step.{kind}")
    found = refusal(folder, portable=kind == "portable")
    assert found.startswith(f"file='{folder}/step.{kind}': {message}"), found
    assert unpickled == []
    if spoil is not swapped:  # nothing is loaded in its place, and the other kind is whole
        load(make(), folder, stamp(), portable=kind != "portable")


def test_a_changed_stamp_is_refused(folder, unpickled):
    path = folder / "stamp.json"
    path.write_text(path.read_text().replace("\n", " \n", 1))
    assert f"file='{folder}/stamp.tag': is no tag of stamp.json by the key in" in refusal(folder)
    stored = json.loads(path.read_text())
    evil = pickle.dumps(("no executable", None))
    (folder / "step.executable").write_bytes(evil)
    described = {"bytes": len(evil), "sha256": hashlib.sha256(evil).hexdigest()}
    stored["programs"]["step"]["executable"] = described
    path.write_text(json.dumps(stored))
    assert "another user or machine wrote the executables, which are pickles" in refusal(folder)
    assert unpickled == []
    path.unlink()
    assert refusal(folder) == f"file='{path}': does not exist: `ablate compile` writes it"


def no_key(folder, home, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(home))


def other_key(folder, home, monkeypatch):
    no_key(folder, home, monkeypatch)
    save({"clear": make()["clear"]}, folder.parent / "other", stamp())


def no_tag(folder, home, monkeypatch):
    (folder / "stamp.tag").unlink()


def cut_tag(folder, home, monkeypatch):
    (folder / "stamp.tag").write_text((folder / "stamp.tag").read_text()[:-2])


@pytest.mark.parametrize("spoil", [no_key, other_key, no_tag, cut_tag])
def test_what_another_user_wrote_is_not_unpickled(folder, tmp_path, monkeypatch, unpickled, spoil):
    spoil(folder, tmp_path / "home", monkeypatch)
    message = refusal(folder)
    assert message.startswith(f"file='{folder}/stamp.tag': is no tag of stamp.json by the key in")
    assert message.endswith("compile it again, or load its portable programs")
    loaded = load(make(), folder, stamp(), portable=True)
    assert unpickled == []
    assert int(loaded["step"](weights(), state(), np.zeros(2, np.int32))[0]["count"]) == 1


@pytest.mark.parametrize("content", [b"", b"not an export", os.urandom(5000)])
def test_a_portable_program_that_jax_cannot_read_is_refused(folder, content):
    stored = json.loads((folder / "stamp.json").read_text())
    (folder / "step.portable").write_bytes(content)
    described = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    stored["programs"]["step"]["portable"] = described
    (folder / "stamp.json").write_text(json.dumps(stored))
    message = refusal(folder, portable=True)
    assert message.startswith(f"file='{folder}/step.portable': JAX {jax.__version__} cannot read")


# what cannot be written


def inverse(x):
    return jnp.linalg.inv(x)


def python(x):
    return jax.pure_callback(lambda a: a, jax.ShapeDtypeStruct((3, 3), jnp.float32), x)


def local():
    """A function whose result is of a class that no other process can import."""

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Pair:
        x: jax.Array

    return lambda x: Pair(x + 1)


@pytest.mark.parametrize(
    "function, message",
    [
        (inverse, "calls lapack_sgetrf_ffi, which no executable can contain"),
        (python, "calls xla_ffi_python_cpu_callback, which no executable can contain"),
        (local(), "cannot be written: Can't pickle local object 'local.<locals>.Pair"),
    ],
)
def test_a_program_that_an_executable_cannot_contain_is_refused(tmp_path, function, message):
    program = Program(jax.jit(function), (jax.ShapeDtypeStruct((3, 3), jnp.float32),))
    with pytest.raises(ConfigError, match=f"^program='p': {message}") as caught:
        save({"p": program}, tmp_path / "DIR", stamp())
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["home"]


@pytest.mark.parametrize("name", ["../step", "a.b", "", "Step", "a/b"])
def test_a_name_that_is_no_name_of_a_file_is_refused(tmp_path, name):
    with pytest.raises(ConfigError, match="^program='.*': must have a name as in Python"):
        save({name: make()["clear"]}, tmp_path / "DIR", stamp())
    assert os.listdir(tmp_path) == []


def test_without_flatbuffers_it_says_what_to_install(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for use in (
        lambda: save(make(), tmp_path / "NEW", stamp()),
        lambda: load(make(), folder, stamp(), portable=True),
    ):
        with pytest.raises(ConfigError, match="portable: requires flatbuffers: pip install"):
            use()


def test_programs_from_jaxs_cache_on_disk_are_compiled_anew(tmp_path):
    """An executable that JAX read from its cache cannot be written: functions of it are missing."""
    options = {
        "jax_compilation_cache_dir": str(tmp_path / "cache"),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    try:
        token_b = np.array([1, 7], np.int32)
        for _ in range(2):  # the second is read from the disk
            jax.clear_caches()
            programs = make()
            expected = programs["step"].function(weights(), state(), token_b)
        save(programs, tmp_path / "DIR", stamp())
        jax.clear_caches()
        save(make(), tmp_path / "again", stamp())
        kept = len(list((tmp_path / "cache").glob("*-cache")))
        for name in ("DIR", "again"):
            found = load(make(), tmp_path / name, stamp())["step"](weights(), state(), token_b)
            jax.tree.map(np.testing.assert_array_equal, found, expected)
        assert kept > 0 and jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


# whole or absent

KILLED = """
import os, signal, sys
from pathlib import Path
from research.inference.compiled import save
from tests.research.inference.compiled.test_store import make, stamp

write, count = Path.write_bytes, int(sys.argv[2])
def written(path, content):
    global count
    write(path, content[: len(content) // 2])
    count -= 1
    if not count:
        os.kill(os.getpid(), signal.SIGKILL)
    return write(path, content)
Path.write_bytes = written
save(make(), Path(sys.argv[1]), stamp())
"""


def test_a_save_that_is_killed_leaves_no_folder(tmp_path):
    (tmp_path / "script.py").write_text(f"import tests.conftest\n{KILLED}")
    command = [sys.executable, "script.py", "DIR", "3"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == -9, done.stderr[-3000:]
    (half,) = tmp_path.glob(".DIR-*")
    assert not (tmp_path / "DIR").exists()
    assert sorted(path.name for path in half.iterdir()) == [
        "clear.executable", "step.executable", "step.portable",
    ]  # fmt: skip
    save(make(), tmp_path / "DIR", stamp())
    assert sorted(load(make(), tmp_path / "DIR", stamp())) == ["clear", "step"]


def test_of_two_writers_one_folder_is_whole_and_the_other_is_refused(tmp_path):
    def compiler(function, *arguments):
        if not (tmp_path / "DIR").exists():
            save(make(), tmp_path / "DIR", stamp())
        return function.lower(*arguments).compile()

    with pytest.raises(ConfigError, match=r"^directory='.*/DIR': must be absent or empty"):
        save(make(), tmp_path / "DIR", stamp(), compiler=compiler)
    assert sorted(os.listdir(tmp_path)) == ["DIR", "home"]
    assert sorted(load(make(), tmp_path / "DIR", stamp())) == ["clear", "step"]
    with pytest.raises(ConfigError, match=r"^directory='.*/DIR': must be absent or empty"):
        save(make(), tmp_path / "DIR", stamp(), compiler=lambda *_: pytest.fail("compiled"))


@pytest.mark.tpu_compile
def test_executables_for_a_slice_that_is_absent_are_written_and_refused_here(tmp_path, unpickled):
    (device, *_) = topology_mesh("v5e:2x2").devices.flat
    place = jax.sharding.SingleDeviceSharding(device)
    there = {
        name: Program(
            program.function,
            jax.tree.map(
                lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), program.arguments
            ),
        )
        for name, program in make().items()
    }
    made = make_stamp(weights(), {}, [device])
    save(there, tmp_path / "DIR", made, compiler=compile_for_tpu)
    assert (tmp_path / "DIR/step.executable").stat().st_size > 10_000
    for portable in (False, True):
        message = refusal(tmp_path / "DIR", portable=portable)
        assert message.startswith("source.platform='cpu': '") and "has 'tpu'; compile" in message
    assert made["machine"]["device"] == "TPU v5 lite"
    assert made["machine"]["topology"] == [[0, 0, 0]]
    assert made["machine"]["compiler"][0].startswith("libtpu ")
    assert unpickled == []
