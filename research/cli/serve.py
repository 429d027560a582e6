"""``ablate serve``: a model behind OpenAI's HTTP routes."""

import argparse
import contextlib
import sys
from importlib.util import find_spec
from pathlib import Path

from layers.config import ConfigError, check
from research.cli import stop
from research.cli.engine_options import add_engine_options, engine_config
from research.cli.options import (
    add_draft_options,
    check_state,
    draft_options,
    language_model_config,
    load_language_model,
    load_speculative,
    model_folder,
    number,
)

_EXAMPLES = """examples:
  ablate serve runs/qwen3                        # http://127.0.0.1:8000/ is a chat page
  ablate serve runs/qwen3 --port=0 --slots=16 --max-length=4096 --kv-dtype=int8
  ablate serve runs/qwen3 --host=0.0.0.0 --api-key-file=keys.txt
"""
_REQUIRED = ("starlette", "uvicorn", "h11", "jinja2", "llguidance")


def add(commands) -> None:
    parser = commands.add_parser(
        "serve",
        help="answer OpenAI's HTTP requests with a trained or imported model",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    what = "the folder of a unit, of a run with one unit, or of a checkpoint; or Hugging Face's"
    parser.add_argument("run", metavar="RUN", type=Path, help=what)
    add_engine_options(parser)
    add_draft_options(parser)
    for option, metavar, default, what in (
        ("--host", "H", "127.0.0.1", "the address; one that is not a loopback address needs keys"),
        ("--port", "P", "8000", "0 takes a free one"),
        ("--engine", "DIR", None, "the programs that `ablate compile` wrote for these sizes"),
        ("--api-key-file", "FILE", None, "the keys of clients, one a line"),
        ("--queue", "N", "64", "requests that wait at most"),
        ("--timeout", "S", "120", "seconds that an answer takes at most"),
    ):
        shown = what if default is None else f"{what}; default: {default}"
        parser.add_argument(option, metavar=metavar, default=default, help=shown)
    parser.set_defaults(command=_serve)


def _serve(options) -> int:
    missing = [name for name in _REQUIRED if find_spec(name) is None]
    if missing:
        names = ", ".join(missing)
        raise ConfigError(f"`ablate serve` requires {names}: pip install -e '.[serve]'")
    port = number(int, "port", options.port)
    queue = number(int, "queue", options.queue)
    timeout = number(float, "timeout", options.timeout)
    folder, drafting = model_folder(options.run), draft_options(options)
    drafts = options.draft or options.ngram
    unused = options.engine is None or drafts is None
    check(unused, "engine", options.engine, "does not support drafts")

    from research.inference.server import ServedTokenizer, Server, ServerConfig

    config = engine_config(options, language_model_config(folder), queue=queue)
    name = options.run.resolve().name
    server = Server(ServerConfig(name, options.host, port, options.api_key_file, timeout=timeout))
    tokenizer = ServedTokenizer(folder)
    engine = _engine(config, folder, drafting, options.engine, tokenizer)
    if options.engine is None:
        print("ablate: compiling", file=sys.stderr)
    engine.warm_up()
    message = "stopping; running requests are finished first (Ctrl-C again: stops at once)"
    with contextlib.ExitStack() as stack:

        def ready(address: str) -> None:
            stack.enter_context(stop.finishing(message))
            print(f"serving {address}", flush=True)

        return server.run(engine, tokenizer, ready)


def _engine(config, folder: Path, drafting, compiled: str | None, tokenizer):
    from research.inference.engine import Engine
    from research.inference.engine.compiled import load_programs

    model = load_language_model(folder)
    speculative = load_speculative(*drafting)
    drafts = [] if speculative is None or speculative.draft is None else [speculative.draft]
    check_state([model, *drafts], config, "max-length", config.max_length)
    programs = None if compiled is None else load_programs(Path(compiled), model, config)
    return Engine(
        model, config, tokenizer=tokenizer.plain, compiled=programs, speculative=speculative
    )
