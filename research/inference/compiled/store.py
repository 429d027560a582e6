"""Writes compiled programs into a folder, and loads them without tracing or compiling.

A folder has ``stamp.json``, its tag (`research.inference.compiled.key`), and two files for each
program: an executable of `jax.experimental.serialize_executable`, which is a pickle, and a portable
program of `jax.export` (StableHLO), which is none. Loading an executable runs what is in it. It is
read only if the stamp is that of this process, the stamp's tag is that of this user's key, and its
SHA-256 is that of the stamp. A portable program is compiled where it is loaded.
"""

import contextlib
import hashlib
import importlib.util
import json
import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax import export
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache import compilation_cache

from layers.config import ConfigError, check
from research.files import check_new, new_directory
from research.inference.compiled.key import is_tag, key_folder, tag
from research.inference.compiled.stamp import EXECUTABLE, PORTABLE, STAMP, read_stamp, spell

TAG = "stamp.tag"
_NAME = re.compile(r"[a-z][a-z0-9_]*")
# calls of functions that JAX registers in a process when it lowers a program, such as LAPACK's
_REGISTERED = re.compile(r'custom_call_target="([^"]+)"[^\n]*API_VERSION_TYPED_FFI')


class Program(NamedTuple):
    """A jitted function of pytrees, and its arguments as `jax.ShapeDtypeStruct` with shardings.

    Arguments that ``function`` donates are donated by the loaded program too.
    """

    function: Any
    arguments: tuple[Any, ...]


Compiler = Callable[..., jax.stages.Compiled]


def save(
    programs: Mapping[str, Program],
    directory: Path,
    stamp: Mapping[str, Any],
    *,
    compiler: Compiler | None = None,
) -> None:
    """Compile ``programs`` and write them into ``directory``, completely or not at all.

    Call it inside `use_mesh` if the programs require a mesh.

    Args:
      stamp: see `research.inference.compiled.stamp.make_stamp`.
      compiler: ``compiler(function, *arguments)``; default: for the devices of this process.
        `research.planning.topology.compile_for_tpu` compiles for devices that are absent.

    Raises:
      ConfigError: ``directory`` is not empty; a program's name is not one of a file; a program
        calls Python or LAPACK, which an executable cannot contain; or `flatbuffers` is missing.
      OSError: it could not be written.
    """
    check_new(directory)
    _require_flatbuffers()
    for name in programs:
        check(bool(_NAME.fullmatch(name)), "program", name, "must have a name as in Python")
    platform = stamp["source"]["platform"]
    tag(b"")  # a key that cannot be used is refused before anything compiles
    with new_directory(directory) as fresh:
        described = {}
        for name, program in programs.items():
            contents = {
                EXECUTABLE: _executable(name, program, compiler or _compile, platform),
                PORTABLE: _portable(name, program, platform),
            }
            for kind, content in contents.items():
                (fresh / f"{name}.{kind}").write_bytes(content)
            described[name] = {
                "arguments": _signature(program.arguments),
                **{kind: _file(content) for kind, content in contents.items()},
            }
        text = json.dumps({**stamp, "programs": described}, indent=1, allow_nan=False) + "\n"
        (fresh / STAMP).write_text(text, encoding="utf-8")
        (fresh / TAG).write_text(tag(text.encode()) + "\n")


def load(
    programs: Mapping[str, Program],
    directory: Path,
    stamp: Mapping[str, Any],
    *,
    portable: bool = False,
) -> dict[str, jax.stages.Compiled]:
    """The compiled functions of ``programs``, from ``directory``.

    Args:
      programs, stamp: as they would be saved now. The weights may have other values.
      portable: compile the portable programs here, in place of the executables. They may come from
        another machine or version of JAX, for the same platform.

    Raises:
      ConfigError: a field of the stamp differs (named with both values), a file is missing or
        changed, or an executable was not written by this user on this machine. Never loads one kind
        of program in place of the other.
    """
    signatures = {name: _signature(program.arguments) for name, program in programs.items()}
    content, stored = read_stamp(directory / STAMP, stamp, signatures, portable)
    if not portable:
        _require_own(directory, content)
    kind = PORTABLE if portable else EXECUTABLE
    loaded = {}
    for name, program in programs.items():
        path = directory / f"{name}.{kind}"
        content = _read(path, stored[name][kind])
        loaded[name] = (_load_portable if portable else _load_executable)(path, content, program)
    return loaded


def devices_of(arguments: Any) -> list:
    """The devices of the first sharded leaf of ``arguments``, in the order of its mesh."""
    for leaf in jax.tree.leaves(arguments):
        sharding: Any = getattr(leaf, "sharding", None)
        mesh: Any = getattr(sharding, "mesh", None)
        if mesh is not None:
            return list(mesh.devices.flat)
        if sharding is not None:
            return list(sharding.device_set)
    return jax.devices()[:1]


# what is written


def _executable(name: str, program: Program, compiler: Compiler, platform: str) -> bytes:
    """A pickle of the executable as bytes, and of the structure of its results."""

    def fresh(*arguments):  # a new function: what JAX compiled before may come from a cache
        return program.function(*arguments)

    fresh.__name__ = name
    donated = _donated(program)
    with without_cache():
        compiled = compiler(jax.jit(fresh, donate_argnums=donated), *program.arguments)
    if platform == "cpu" and (target := _REGISTERED.search(str(compiled.as_text()))):
        # it would end the process that loads it: jax-ml/jax#28908
        raise ConfigError(f"program={name!r}: calls {target[1]}, which no executable can contain")
    try:
        content, _, out_tree = serialize_executable.serialize(compiled)
        return pickle.dumps((content, out_tree))
    except (
        ValueError,
        TypeError,
        AttributeError,
        NotImplementedError,
        pickle.PickleError,
    ) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"program={name!r}: cannot be written: {reason[:500]}") from None


def _compile(function: Any, *arguments: Any) -> jax.stages.Compiled:
    return function.lower(*arguments).compile()


@contextlib.contextmanager
def without_cache() -> Iterator[None]:
    """Compile anew: an executable from JAX's cache on disk lacks functions when written again."""
    before = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # JAX reads the flag once
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def _portable(name: str, program: Program, platform: str) -> bytes:
    """The program as a function of a flat list of arrays: no classes of ours are in the file."""
    leaves, tree = jax.tree.flatten(program.arguments)

    def flat(*arrays):
        return jax.tree.leaves(program.function(*jax.tree.unflatten(tree, arrays)))

    flat.__name__ = name
    try:
        return bytes(export.export(jax.jit(flat), platforms=[platform])(*leaves).serialize())
    except (ValueError, NotImplementedError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"program={name!r}: cannot be exported: {reason[:500]}") from None


def _donated(program: Program) -> tuple[int, ...]:
    """The positions of the arguments that the program's function donates."""
    info, _ = program.function.trace(*program.arguments).args_info
    flags = [[leaf.donated for leaf in jax.tree.leaves(argument)] for argument in info]
    return tuple(at for at, argument in enumerate(flags) if any(argument))


def _signature(arguments: tuple[Any, ...]) -> str:
    """A hash of paths, shapes, dtypes and shardings of ``arguments``, 16 hexadecimal digits."""
    leaves = jax.tree_util.tree_flatten_with_path(arguments)[0]
    lines = [f"{jax.tree_util.keystr(path)} {spell(leaf)}" for path, leaf in leaves]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _file(content: bytes) -> dict[str, Any]:
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


# what is read


def _require_own(directory: Path, content: bytes) -> None:
    """Raise `ConfigError` unless this user's key made the tag of the stamp's ``content``."""
    path = directory / TAG
    text = path.read_bytes()[:100].decode("ascii", "replace").strip() if path.is_file() else ""
    check(is_tag(text, content), "file", str(path),
          f"is no tag of {STAMP} by the key in {str(key_folder())!r}: another user or machine "
          "wrote the executables, which are pickles; compile it again, or load its portable "
          "programs"
    )  # fmt: skip


def _read(path: Path, described: Mapping[str, Any]) -> bytes:
    """The bytes of the file ``path``, which are those that the stamp describes."""
    check(path.is_file(), "file", str(path), "does not exist; compile it again")
    size = path.stat().st_size
    check(size == described["bytes"], "file", str(path),
          f"must have {described['bytes']} bytes, has {size}; compile it again")  # fmt: skip
    content = path.read_bytes()
    check(_file(content)["sha256"] == described["sha256"], "file", str(path),
          f"has another SHA-256 than in {STAMP}; compile it again")  # fmt: skip
    return content


def _load_executable(path: Path, content: bytes, program: Program) -> jax.stages.Compiled:
    serialised, out_tree = pickle.loads(content)
    devices = devices_of(program.arguments)
    in_tree = jax.tree.structure((program.arguments, {}))
    return serialize_executable.deserialize_and_load(
        serialised, in_tree, out_tree, backend=devices[0].client, execution_devices=devices
    )


def _load_portable(path: Path, content: bytes, program: Program) -> jax.stages.Compiled:
    _require_flatbuffers()
    try:
        exported = export.deserialize(bytearray(content))
    except Exception as error:  # also of flatbuffers, which does not check what it reads
        reason = " ".join(str(error).split())[:500] or type(error).__name__
        version = f"JAX {jax.__version__} cannot read it"
        raise ConfigError(f"file={str(path)!r}: {version}: {reason}; compile it again") from None
    traced = program.function.trace(*program.arguments)
    for what, here, there in (
        ("arguments", jax.tree.leaves(program.arguments), exported.in_avals),
        ("results", jax.tree.leaves(traced.out_info), exported.out_avals),
    ):
        here, there = ([(a.shape, a.dtype) for a in arrays] for arrays in (here, there))
        check(here == there, "file", str(path), f"has other {what} than this program")

    def call(*arguments):
        return jax.tree.unflatten(traced.out_tree, exported.call(*jax.tree.leaves(arguments)))

    call.__name__ = path.stem
    return _compile(jax.jit(call, donate_argnums=_donated(program)), *program.arguments)


def _require_flatbuffers() -> None:
    if importlib.util.find_spec("flatbuffers") is None:
        raise ConfigError("portable: requires flatbuffers: pip install -e '.[serve]'")
