"""``ablate generate``: text from a trained or imported model, printed token by token."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from layers.config import check
from research.cli.options import (
    add_draft_options,
    check_state,
    draft_options,
    load_language_model,
    load_speculative,
    model_folder,
    number,
)

_EXAMPLES = """examples:
  ablate generate runs/demo/gqa/seed0 --prompt="def " --temperature=0.5
  ablate generate runs/qwen3 --prompt="The capital of France is" --max-tokens=20
  ablate generate runs/qwen3 --prompt="The capital" --top-p=0.9 --draft=runs/qwen3-small
"""
# sizes of the compiled programs: few, so that they are found in JAX's compilation cache
_LENGTHS = 256
_CHUNKS = (16, 256)


def add(commands) -> None:
    parser = commands.add_parser(
        "generate",
        help="generate text with a trained or imported model",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    what = "the folder of a unit, of a run with one unit, or of a checkpoint; or Hugging Face's"
    parser.add_argument("run", metavar="RUN", type=Path, help=what)
    parser.add_argument("--prompt", metavar="TEXT", default="", help="the beginning of the text")
    parser.add_argument("--max-tokens", metavar="N", default="200", help="new tokens; default: 200")
    parser.add_argument(
        "--temperature", metavar="T", default="1", help="0 selects the likeliest token; default: 1"
    )
    parser.add_argument("--top-k", metavar="K", help="sample from the K likeliest tokens")
    what = "sample from the likeliest tokens whose probabilities reach P together"
    parser.add_argument("--top-p", metavar="P", help=what)
    parser.add_argument("--seed", metavar="S", default="0", help="seed of sampling; default: 0")
    what = "end before this text; may be given several times"
    parser.add_argument("--stop", metavar="TEXT", action="append", default=[], help=what)
    add_draft_options(parser)
    what = "read special tokens such as <|im_start|> in the prompt, and show them in the text"
    parser.add_argument("--special-tokens", action="store_true", help=what)
    parser.set_defaults(command=_generate)


def _generate(options) -> int:
    count = number(int, "max-tokens", options.max_tokens)
    check(count > 0, "max-tokens", count, "must be > 0")
    fields: dict[str, Any] = {
        name: number(kind, name.replace("_", "-"), getattr(options, name))
        for name, kind in (("temperature", float), ("seed", int), ("top_k", int), ("top_p", float))
        if getattr(options, name) is not None
    }
    folder = model_folder(options.run)
    drafting = draft_options(options)

    from research.inference import SamplingConfig, load_prompt_tokenizer
    from research.inference.engine import Engine, EngineConfig, Request
    from research.inference.engine.request import NAN

    sampling = SamplingConfig(max_new_tokens=count, **fields)
    tokenizer = load_prompt_tokenizer(folder, options.special_tokens)
    prompt = tokenizer.encode(options.prompt)
    model, speculative = load_language_model(folder), load_speculative(*drafting)
    size = model.config.vocab_size
    stops = tuple(stop for stop in tokenizer.stop_tokens if stop < size)
    sampling = dataclasses.replace(sampling, stop_tokens=stops)
    request = Request(prompt, sampling, stop=tuple(options.stop))

    length = -(-(len(prompt) + count) // _LENGTHS) * _LENGTHS
    draft = None if speculative is None else speculative.draft
    models = [model] if draft is None else [model, draft]
    for one in models:
        if one.config.position == "learned":
            length = min(length, one.config.max_length or length)
    chunk = min(max(_CHUNKS[0], 1 << (len(prompt) - 1).bit_length()), _CHUNKS[1], length)
    sizes = EngineConfig(slots=1, max_length=length, chunk=chunk)
    check_state(models, sizes, "max-tokens", count)
    engine = Engine(model, sizes, tokenizer=tokenizer, speculative=speculative)
    engine.add(request)
    unprinted = [options.prompt]  # until the first token: an invalid request prints nothing
    for event in engine.stream():
        check(event.finish_reason != "nan", "run", str(options.run), NAN)
        print(*unprinted, event.text, sep="", end="", flush=True)
        unprinted.clear()
    print()
    return 0
