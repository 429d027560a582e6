"""The decoder that `research.benchmark.train` times, and each contestant's training step of it."""

import os
from typing import NamedTuple

import jax
from flax import nnx

from layers.attention import AttentionConfig
from layers.decoder import Decoder, DecoderConfig
from layers.mlp import MlpConfig
from research.benchmark import measure, step
from research.benchmark.step import OPTIMIZER, OURS

EAGER, COMPILED = "torch eager", "torch.compile"
BATCH, TIME, VOCAB, HEAD = 8, 256, 1024, 64


class Size(NamedTuple):
    width: int
    layers: int


SIZES = {"width256": Size(256, 4), "width512": Size(512, 8)}


def decoder(size: Size) -> DecoderConfig:
    """The decoder: pre-norm RMSNorm, rotary, SwiGLU of three times the width, tied embeddings."""
    return DecoderConfig(
        vocab_size=VOCAB,
        width=size.width,
        num_layers=size.layers,
        attention=AttentionConfig(num_heads=size.width // HEAD),
        mlp=MlpConfig(3 * size.width),
        scan=False,
    )


def begin(size: Size) -> Decoder:
    """Our model of ``size``, with the same weights at each call."""
    return jax.jit(lambda: Decoder(decoder(size), rngs=nnx.Rngs(0)))()


def prepare(who: str, size: Size, model: Decoder | None) -> measure.Prepared:
    """The step of ``who`` with ``model``'s weights, or with random ones if it is None."""
    arrays = step.batch(BATCH, TIME, VOCAB)
    if who == OURS:
        return step.prepare_ours(begin(size) if model is None else model, arrays, OPTIMIZER)
    import torch

    from research.benchmark import torch_decoder

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    theirs = torch_decoder.of_config(decoder(size), TIME)
    if model is not None:
        torch_decoder.copy(model, theirs)
    loss_of = torch.compile(theirs) if who == COMPILED else theirs
    return step.prepare_torch(loss_of, theirs.parameters(), arrays, OPTIMIZER)
