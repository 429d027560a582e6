"""The options that decide the programs of an engine."""

import dataclasses

from layers.config import check
from research.cli.options import number

_MAX_LENGTH, _CHUNK = 2048, 256
_OPTIONS = (
    ("--slots", "N", "8", "samples that are computed at a time"),
    ("--max-length", "N", None, f"tokens of a prompt and its answer; default: {_MAX_LENGTH}"),
    ("--chunk", "N", None, f"tokens of a prompt that are computed at a time; default: {_CHUNK}"),
    ("--page", "N", None, "tokens of a page of the cache; default: 16"),
    ("--pages", "N", None, "pages of the cache; default: as many as all slots can fill"),
    ("--kv-dtype", "D", None, "how keys and values are stored; default: as the model computes"),
)
_CACHE = ("page", "pages", "kv_dtype")


def add_engine_options(parser) -> None:
    for option, metavar, default, what in _OPTIONS:
        shown = what if default is None else f"{what}; default: {default}"
        parser.add_argument(option, metavar=metavar, default=default, help=shown)


def engine_config(options, model, **fields):
    """The `EngineConfig` of ``options`` and other ``fields`` for a model's configuration.

    Its cache has pages and prefixes are shared. A model without keys has no pages.

    Raises:
      ConfigError: a value is not allowed, or would change nothing in this model.
    """
    from layers.state import CacheConfig
    from research.inference.engine import EngineConfig
    from research.inference.engine.config import RECURRENT

    sizes = {
        name: number(int, name.replace("_", "-"), getattr(options, name))
        for name in ("slots", "max_length", "chunk", "page", "pages")
        if getattr(options, name) is not None
    }
    limit = model.max_length if model.position == "learned" else None
    default = _MAX_LENGTH if limit is None else min(_MAX_LENGTH, limit)
    pool = {name: sizes.pop(name) for name in ("page", "pages") if name in sizes}
    if all(kind in RECURRENT for kind in model.pattern):
        for name in _CACHE:
            value, option = getattr(options, name), name.replace("_", "-")
            check(value is None, option, value, "the model has no keys and values to store")
        cache = CacheConfig()
    else:
        cache = CacheConfig("paged", options.kv_dtype, **pool)
    sizes = {"max_length": default, **sizes}
    most = min(_CHUNK, sizes["max_length"])
    sizes.setdefault("chunk", most // cache.page * cache.page or most)
    config = EngineConfig(**sizes, cache=cache, prefix=True)
    config = dataclasses.replace(config, **fields)
    config.check_model(model)
    return config
