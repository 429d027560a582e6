"""Generation with a cache: one prefill of all prompts, then one token per row and step."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from layers.config import check
from layers.decoder import Decoder, State
from layers.outputs_first import for_decoding
from research.inference.sampling import SamplingConfig, SamplingRows, sample

SMALLEST_BUCKET = 16
STREAMED_TOKENS = 8  # tokens per row between two transfers from the device while streaming


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Progress:
    """The state of decoding: the cache, each row's next input, and which rows have stopped."""

    state: State
    rows: SamplingRows
    token_b: jax.Array
    position_b: jax.Array
    stopped_b: jax.Array


def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    *,
    max_length: int | None = None,
    stream: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """New tokens after each of ``prompts``, which may differ in length.

    A row ends with its first stop token, which is part of the result, or after
    ``sampling.max_new_tokens``. The tokens of a row do not depend on the other prompts: greedy
    tokens are those of the prompt alone, and sampled tokens depend on the seed and the row's index.

    Compiles once for each batch size, number of stop tokens, ``max_new_tokens`` and prompt length
    rounded up to a power of two. Runs on one device: the cache's writes are not sharded over a
    mesh.

    Args:
      max_length: the largest length of a row's prompt and new tokens together; None: no limit. A
        model with learned positions has its own limit too.
      stream: called with ``(row, token)`` soon after each token is chosen; in order within a row.
        It does not change the tokens.

    Raises:
      ConfigError: no prompts, an empty prompt, a token outside the vocabulary, a prompt that
        exceeds a limit with ``max_new_tokens``, or ``logprobs``, which are not returned here. It is
        raised before anything is compiled.
    """
    limit = _check(model, prompts, sampling, max_length)
    model = for_decoding(model)  # else each token would copy the weights of its layers
    chunk = STREAMED_TOKENS if stream else max(sampling.max_new_tokens, 1)
    rows: list[list[int]] = [[] for _ in prompts]
    for tokens_bt in _chunks(model, prompts, sampling, limit, chunk):
        for token_b in tokens_bt.T:
            for row, token in enumerate(token_b.tolist()):
                if token >= 0:
                    rows[row].append(token)
                    if stream:
                        stream(row, token)
    return rows


def _check(
    model: Decoder,
    prompts: Any,
    sampling: SamplingConfig,
    max_length: int | None,
) -> int | None:
    """Check the arguments of `generate`; the smallest limit on a row's length, or None."""
    config = model.config
    check(len(prompts) > 0, "prompts", list(prompts), "must hold at least one prompt")
    check(max_length is None or max_length > 0, "max_length", max_length, "must be > 0 or None")
    limit, name = max_length, "max_length"
    learned = config.max_length if config.position == "learned" else None
    if learned is not None and (limit is None or learned < limit):
        limit, name = learned, "the model's max_length"
    sampling.check_vocabulary(config.vocab_size)
    check(
        sampling.logprobs is None, "logprobs", sampling.logprobs, "generate() returns tokens only"
    )
    for row, prompt in enumerate(prompts):
        listed = isinstance(prompt, list | tuple | np.ndarray)
        check(listed, f"prompts[{row}]", prompt, "must be a list of tokens")
        check(len(prompt) > 0, f"prompts[{row}]", list(prompt), "must hold at least one token")
        for i, token in enumerate(prompt):
            allowed = isinstance(token, int | np.integer) and 0 <= int(token) < config.vocab_size
            check(allowed, f"prompts[{row}][{i}]", token,
                  f"must be an integer in [0, vocab_size={config.vocab_size})")  # fmt: skip
        total = len(prompt) + sampling.max_new_tokens
        check(limit is None or total <= limit, f"len(prompts[{row}])", len(prompt),
              f"with max_new_tokens={sampling.max_new_tokens} exceeds {name}={limit}")  # fmt: skip
    return limit


def _chunks(model, prompts, sampling, limit, chunk) -> Iterator[np.ndarray]:
    """Yields int32 ``[b, chunk]`` new tokens until all rows have stopped; −1 after a row's end.

    The prefill takes each prompt without its last token, which is the first input of the loop. So
    the logits of the prompt, which are not used, are not computed.
    """
    lengths_b = np.array([len(prompt) for prompt in prompts], np.int32)
    width = max(SMALLEST_BUCKET, 1 << int(lengths_b.max() - 1).bit_length())
    capacity = width + sampling.max_new_tokens
    if limit is not None:
        width, capacity = min(width, limit), min(capacity, limit)
    tokens_bt = np.zeros((len(prompts), width), np.int32)
    for row, prompt in enumerate(prompts):
        tokens_bt[row, : len(prompt) - 1] = prompt[:-1]
    positions_bt = np.broadcast_to(np.arange(width, dtype=np.int32), tokens_bt.shape)
    positions_bt = np.where(positions_bt < lengths_b[:, None] - 1, positions_bt, -1)
    ones = [
        SamplingRows.of(sampling, model.config.vocab_size, prompt, index)
        for index, prompt in enumerate(prompts)
    ]
    progress = _Progress(
        rows=jax.tree.map(lambda *leaves: np.concatenate(leaves), *ones),
        state=_prefill(model, tokens_bt, positions_bt, capacity=capacity),
        token_b=jnp.asarray([prompt[-1] for prompt in prompts], jnp.int32),
        position_b=jnp.asarray(lengths_b - 1),
        stopped_b=jnp.zeros(len(prompts), bool),
    )
    stops, total = np.array(sampling.stop_tokens, np.int32), sampling.max_new_tokens
    for done in range(0, total, chunk):
        count = min(chunk, total - done)
        progress, new_bt = _decode(model, progress, stops, count, most=chunk)
        yield np.asarray(new_bt)
        if np.all(progress.stopped_b):
            return


@functools.partial(jax.jit, static_argnames="capacity")
def _prefill(model, tokens_bt, positions_bt, *, capacity):
    state = model.init_state(tokens_bt.shape[0], capacity)
    return model(tokens_bt, positions_bt, state=state).state


@functools.partial(jax.jit, static_argnames="most", donate_argnames="progress")
def _decode(model, progress, stops, count, *, most):
    """``count ≤ most`` more tokens per row, int32 ``[b, most]``, followed by −1.

    Ends early when all rows have stopped.
    """
    new_bt = jnp.full((progress.token_b.shape[0], most), -1, jnp.int32)

    def unfinished(carry):
        i, progress, _ = carry
        return (i < count) & ~jnp.all(progress.stopped_b)

    def advance(carry):
        i, progress, new_bt = carry
        position_b = jnp.where(progress.stopped_b, -1, progress.position_b)
        out = model(progress.token_b[:, None], position_b[:, None], state=progress.state)
        token_b = sample(out.logits_btv[:, 0], position_b + 1, progress.rows).token_b
        new_bt = new_bt.at[:, i].set(jnp.where(progress.stopped_b, -1, token_b))
        advanced = _Progress(
            state=out.state,
            rows=progress.rows.counted(token_b, ~progress.stopped_b),
            token_b=token_b,
            position_b=progress.position_b + 1,
            stopped_b=progress.stopped_b | jnp.any(token_b[:, None] == stops, axis=1),
        )
        return i + 1, advanced, new_bt

    _, progress, new_bt = jax.lax.while_loop(
        unfinished, advance, (jnp.zeros((), jnp.int32), progress, new_bt)
    )
    return progress, new_bt
