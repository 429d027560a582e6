"""``ablate generate``: text from a trained or imported model, printed token by token."""

import argparse
from pathlib import Path

from layers.config import check
from research.cli.options import model_folder, number

_EXAMPLES = """examples:
  ablate generate runs/demo/gqa/seed0 --prompt="def " --temperature=0.5
  ablate generate runs/qwen3 --prompt="The capital of France is" --max-tokens=20
"""


def add(commands) -> None:
    parser = commands.add_parser(
        "generate",
        help="generate text with a trained or imported model",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    what = "a unit's folder, the folder of a run with one unit, or an imported checkpoint"
    parser.add_argument("run", metavar="RUN", type=Path, help=what)
    parser.add_argument("--prompt", metavar="TEXT", default="", help="the beginning of the text")
    parser.add_argument("--max-tokens", metavar="N", default="200", help="new tokens; default: 200")
    parser.add_argument(
        "--temperature", metavar="T", default="1", help="0 selects the likeliest token; default: 1"
    )
    parser.add_argument("--seed", metavar="S", default="0", help="seed of sampling; default: 0")
    what = "read special tokens such as <|im_start|> in the prompt, and show them in the text"
    parser.add_argument("--special-tokens", action="store_true", help=what)
    parser.set_defaults(command=_generate)


def _generate(options) -> int:
    count = number(int, "max-tokens", options.max_tokens)
    temperature = number(float, "temperature", options.temperature)
    seed = number(int, "seed", options.seed)
    check(count > 0, "max-tokens", count, "must be > 0")
    folder = model_folder(options.run)

    import jax

    from research.inference import SamplingConfig, TextStream, generate, load_prompt_tokenizer
    from research.training import load_model

    sampling = SamplingConfig(max_new_tokens=count, temperature=temperature, seed=seed)
    tokenizer = load_prompt_tokenizer(folder, options.special_tokens)
    prompt = tokenizer.encode(options.prompt)
    model = load_model(folder)
    outputs = model.config.outputs
    check(outputs is None, "model.outputs", outputs, "generation requires a language model")
    if len(jax.devices()) > 1:  # `generate` runs on one device
        model = jax.device_put(jax.device_get(model), jax.devices()[0])
    _check_memory(model, len(prompt), count)
    stops = tuple(stop for stop in tokenizer.stop_tokens if stop < model.config.vocab_size)
    sampling = SamplingConfig(count, temperature, stop_tokens=stops, seed=seed)

    text = TextStream(tokenizer)
    unprinted = [options.prompt]  # until the first token: an invalid request prints nothing

    def show(row: int, token: int) -> None:
        print(*unprinted, text.push(token), sep="", end="", flush=True)
        unprinted.clear()

    generate(model, [prompt], sampling, stream=show)
    print(text.flush())
    return 0


def _check_memory(model, prompt_tokens: int, new_tokens: int) -> None:
    """Raise `ConfigError` if memory cannot hold the state: XLA may wait for ever to allocate it."""
    import jax

    from research.memory import device_memory, spell

    state = jax.eval_shape(lambda: model.init_state(1, prompt_tokens + new_tokens))
    needed = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(state))
    memory = device_memory(jax.devices()[0])
    if memory is not None:
        sizes = f"{spell(needed)} of state must fit into {spell(memory)} of memory"
        check(needed <= memory, "max-tokens", new_tokens, sizes)
