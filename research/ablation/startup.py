"""How an engine becomes ready: its programs are compiled, or loaded from a folder."""

import contextlib
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.monitoring
from jax.experimental.compilation_cache import compilation_cache

from layers.config import ConfigError
from layers.decoder import Decoder
from research.inference.compiled.stamp import STAMP
from research.inference.compiled.store import without_cache
from research.inference.engine import Engine, EngineConfig
from research.inference.engine.compiled import load_programs


class Start(NamedTuple):
    """An engine that is warm, and the seconds since its weights were in memory."""

    engine: Engine
    seconds: float


def start(
    model: Decoder, config: EngineConfig, folder: Path | None = None, *, portable: bool = False
) -> Start:
    """An engine with the programs in ``folder``; None: jit compiles them.

    What JAX has traced and compiled before is forgotten, and it uses no cache on disk.
    """
    with without_cache():
        return _start(model, config, folder, portable)


def start_with_cache(model: Decoder, config: EngineConfig, cache: Path) -> Start:
    """An engine whose programs jit traces, and reads from JAX's ``cache``, a folder."""
    options = {
        "jax_compilation_cache_dir": str(cache),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in options}
    try:
        for name, value in options.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        _start(model, config, None, False)  # fills it
        return _start(model, config, None, False)
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def _start(model: Decoder, config: EngineConfig, folder: Path | None, portable: bool) -> Start:
    jax.clear_caches()
    begin = time.perf_counter()
    programs = None
    if folder is not None:
        programs = load_programs(folder, model, config, portable=portable)
    engine = Engine(model, config, compiled=programs)
    engine.warm_up()
    return Start(engine, time.perf_counter() - begin)


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """A list that grows by an item with each program that is compiled inside."""
    found: list[str] = []

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        if "backend_compile" in event:
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def not_refused(
    folder: Path, model: Decoder, config: EngineConfig, fields: Sequence[Sequence[str]]
) -> list[str]:
    """Those of ``fields`` whose other value in the stamp in ``folder`` is not refused by name.

    A field is its path in the stamp, e.g. ``("machine", "jax")``.
    """
    copy, accepted = folder.with_name(f"{folder.name}-changed"), []
    shutil.copytree(folder, copy, dirs_exist_ok=True)
    content = (folder / STAMP).read_text(encoding="utf-8")
    for path in fields:
        stamp = json.loads(content)
        inner = stamp
        for name in path[:-1]:
            inner = inner[name]
        assert path[-1] in inner, path
        inner[path[-1]] = "another"
        (copy / STAMP).write_text(json.dumps(stamp), encoding="utf-8")
        try:
            load_programs(copy, model, config)
        except ConfigError as error:
            if str(error).startswith(f"{'.'.join(path)}=") and "'another'" in str(error):
                continue
        accepted.append(".".join(path))
    shutil.rmtree(copy)
    return accepted
