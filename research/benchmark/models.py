"""One training step of whole models, compared with transformers: same weights, data and machine.

A step is forward, backward and AdamW, width 256, 4 layers, 8 rows of 256 tokens, float32. Ours is
the step of `research.training` on an unrolled stack. Theirs is eager PyTorch with its attention and
its fused AdamW on all cores. Both begin from transformers' weights and compute two steps before any
is timed. The losses must agree, and so must their decrease after the first update.

Results of profiles on a CPU, per operation (`jax.profiler`, on the two cores that the records
name):

- Half to two thirds of a step are matrix products, which XLA and PyTorch compute equally fast.
- XLA lost time in the gradients of weights: it transposes one of the two factors in memory, and
  fuses the computation of that factor into the transposition. JAX's rule always transposed the
  incoming gradient, so that the backward passes of norms, gates and convolutions ran across memory
  and twice. Transposing the smaller factor (`layers.linear.product`) saved 16% of the work of
  Llama's step, 9% of GPT-2's, 5% of Mixtral's, a fifth of Mamba's and Mamba-2's and 17% of
  RWKV-4's.
- A scanned stack costs 5% more for attention and 25 to 30% more for Mamba, whose larger activations
  are copied into and out of the loop's stacks. So stacks are unrolled, here and in the experiments.
- Optimisation barriers, which should keep an array in memory, have no effect: XLA:CPU removes them
  before fusion. Recomputing Mamba's convolution and norm in the backward pass (`jax.checkpoint`)
  saved nothing.
- Theirs loops over tokens in Python for Mamba and RWKV-4, and each iteration of Mamba's loop fills
  a gradient as large as all its states. Mamba-2 uses chunked matrix products, as ours does. The
  products alone take a third of their step, so 3 times as fast is out of reach.
"""

import contextlib
import dataclasses
import importlib
import importlib.util
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import nnx

from layers.config import ConfigError
from layers.decoder import Decoder
from research.benchmark import measure, step
from research.benchmark.run import machine_record
from research.benchmark.step import OPTIMIZER, OURS
from research.benchmark.targets import STEP, judge
from research.models import FAMILIES, decoder_config, load
from research.training.flops import train_flops_per_token

NAME = "models"
THEIRS = "transformers"
PACKAGES = ("torch", "transformers")
BATCH, TIME, VOCAB, WIDTH, LAYERS = 8, 256, 1024, 256, 4


class Model(NamedTuple):
    """``kind``: prefix of transformers' classes; ``fields``: of their configuration."""

    kind: str
    family: str
    fields: Mapping[str, Any]


_SIZES = dict(
    vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=LAYERS, tie_word_embeddings=True,
    bos_token_id=None, eos_token_id=None, pad_token_id=None,
)  # fmt: skip
_ATTENTION = dict(
    _SIZES, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=TIME
)
MODELS = {
    "llama": Model("Llama", "llama", dict(_ATTENTION, intermediate_size=3 * WIDTH)),
    "qwen3": Model("Qwen3", "qwen3", dict(_ATTENTION, intermediate_size=3 * WIDTH, head_dim=64)),
    "gpt2": Model(
        "GPT2",
        "gpt2",
        dict(
            _SIZES, n_positions=TIME, n_embd=WIDTH, n_layer=LAYERS, n_head=4, resid_pdrop=0.0,
            embd_pdrop=0.0, attn_pdrop=0.0,
        ),
    ),
    "mixtral": Model(
        "Mixtral",
        "mixtral",
        dict(
            _ATTENTION, intermediate_size=WIDTH, num_local_experts=8, num_experts_per_tok=2,
            sliding_window=None,
        ),
    ),
    "mamba": Model("Mamba", "mamba", dict(_SIZES, state_size=16)),
    "mamba2": Model(
        "Mamba2",
        "mamba2",
        dict(_SIZES, state_size=128, num_heads=8, head_dim=64, n_groups=1),
    ),
    "rwkv4": Model("Rwkv", "rwkv", dict(_SIZES, context_length=TIME, rescale_every=0)),
}  # fmt: skip


def chosen(names: Sequence[str] | None) -> list[str]:
    """``names`` of `MODELS`, checked by `step.choose`."""
    return step.choose(names, MODELS)


def bench(
    names: Sequence[str], *, rounds: int, seconds: float, budget: measure.Budget
) -> dict[str, Any]:
    """A step of each of ``names``, ours and theirs in turn, as one JSON-ready record."""
    machine = machine_record(PACKAGES)  # includes the load before the measurements
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    ceilings = {"float32": measure.ceilings("float32", rounds, seconds)}
    measured = {}
    for name in names:
        deadline = budget.share()
        with their_weights(MODELS[name], not missing) as (theirs, directory):
            measured[name] = _measure(name, theirs, directory, rounds, seconds, deadline, budget)
        if missing:
            reason = f"skipped: {' and '.join(missing)} not installed"
            measured[name][STEP][THEIRS] = {"absent": reason}
    result = {"op": NAME, "passes": [STEP], "machine": machine}
    result |= {"ceilings": ceilings, "cases": measured}
    return result | {"targets": judge(result)}


@contextlib.contextmanager
def their_weights(model: Model, installed: bool) -> Iterator[tuple[Any, Path | None]]:
    """Transformers' model and a directory with its weights; both None if not ``installed``."""
    if not installed:
        yield None, None
        return
    torch, transformers = (importlib.import_module(name) for name in ("torch", "transformers"))
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    config = getattr(transformers, f"{model.kind}Config")(**model.fields)
    theirs = transformers.AutoModelForCausalLM.from_config(config).train()
    with tempfile.TemporaryDirectory() as directory:
        theirs.save_pretrained(directory)
        yield theirs, Path(directory)


def _measure(
    name: str, theirs: Any, directory: Path | None, rounds, seconds, deadline, budget
) -> dict[str, Any]:
    model = our_model(MODELS[name], directory)
    parameters = parameters_of(model)
    sizes = {"width": WIDTH, "layers": LAYERS, "batch": BATCH, "tokens": TIME, "vocab": VOCAB}
    case = {**sizes, "parameters": parameters, "dtype": "float32"}
    flops = train_flops_per_token(model, TIME) * BATCH * TIME
    arrays = step.batch(BATCH, TIME, VOCAB)
    prepared = {OURS: step.prepare_ours(model, arrays, OPTIMIZER)}
    if theirs is not None:
        count = sum(parameter.numel() for parameter in theirs.parameters())
        if count != parameters:
            raise ConfigError(f"{name}: {parameters} parameters of ours, {count} of theirs")
        prepared[THEIRS] = _prepare_theirs(theirs, arrays)
    return {"case": case, STEP: step.rows(prepared, flops, rounds, seconds, deadline, budget.clock)}


def our_model(model: Model, directory: Path | None) -> Decoder:
    """Our model with the weights in ``directory``, or with random weights."""
    if directory is not None:
        return load(directory, scan=False)
    hf = {"architectures": [FAMILIES[model.family].architecture], **model.fields}
    config = dataclasses.replace(decoder_config(hf), scan=False)
    return jax.jit(lambda: Decoder(config, rngs=nnx.Rngs(0)))()


def parameters_of(model: Decoder) -> int:
    """The number of parameters of ``model``."""
    return sum(leaf.size for leaf in jax.tree.leaves(model))


def _prepare_theirs(model: Any, arrays: Mapping[str, Any]) -> measure.Prepared:
    cross_entropy = importlib.import_module("torch").nn.functional.cross_entropy

    def loss_of(tokens, targets):
        logits = model(tokens, use_cache=False).logits
        return cross_entropy(logits.flatten(0, 1), targets.flatten())

    return step.prepare_torch(loss_of, model.parameters(), arrays, OPTIMIZER)
