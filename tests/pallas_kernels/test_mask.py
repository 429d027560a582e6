"""A mask against a query and a key at a time, and what it becomes for blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.flash_attention.ranges import all_see, extremes, may_see
from pallas_kernels.mask import CAUSAL, Mask
from tests.layers.test_attention import seen


def drawn(data, t, s):
    """A mask of 2 rows and the same as arguments of `seen`."""

    def ints(low, high, n):
        rows = st.lists(st.integers(low, high), min_size=n, max_size=n)
        return np.array([data.draw(rows) for _ in range(2)], np.int32)

    q_at, k_at = ints(-1, 9, t), ints(-1, 9, s)
    segments = data.draw(st.booleans())
    q_in, k_in = (ints(0, 2, t), ints(0, 2, s)) if segments else (None, None)
    causal, window = data.draw(st.booleans()), data.draw(st.none() | st.integers(1, 6))
    until = ints(-1, 9, t) if causal and data.draw(st.booleans()) else None
    mask = Mask(q_at, k_at, q_in, k_in, until, causal=causal, window=window)
    return mask, (q_at, k_at, q_in, k_in, causal, window, until)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_what_is_visible_and_which_blocks_meet(data):
    t, s, block = 6, 9, 3
    mask, arguments = drawn(data, t, s)
    want = seen(*arguments)
    np.testing.assert_array_equal(mask.visible(t, s), want)
    whole = jax.tree.map(np.asarray, mask.whole(2, t, s).padded(t, s))
    q = extremes(whole.q_positions_bt, whole.q_segments_bt, block, whole.until_bt)
    k = extremes(whole.k_positions_bs, whole.k_segments_bs, block)
    q, k = jax.tree.map(lambda a: a[:, :, None], q), jax.tree.map(lambda a: a[:, None], k)

    class Rule:
        causal, window, packed = mask.causal, mask.window, mask.q_segments_bt is not None

    may, every = np.asarray(may_see(Rule, q, k)), np.asarray(all_see(Rule, q, k))
    blocks = want.reshape(2, t // block, block, s // block, block)
    assert np.all(may | ~blocks.any((2, 4)))  # none that is needed is skipped
    assert np.all(~every | blocks.all((2, 4)))  # none is left unmasked that needs a mask


def test_positions_default_to_the_order():
    np.testing.assert_array_equal(CAUSAL.visible(4, 4)[0], np.tri(4, dtype=bool))
    np.testing.assert_array_equal(CAUSAL.distance(2, 3)[0], [[0, 1, 2], [1, 0, 1]])


def test_padding_is_seen_by_nobody():
    mask = Mask(q_segments_bt=jnp.ones((2, 3), int), k_segments_bs=jnp.ones((2, 5), int))
    padded = mask.whole(2, 3, 5).padded(4, 8)
    got = padded.visible(4, 8)
    assert not np.any(got[:, 3:]) and not np.any(got[:, :, 5:])
    np.testing.assert_array_equal(got[:, :3, :5], np.broadcast_to(mask.visible(3, 5), (2, 3, 5)))


def test_it_is_a_pytree_whose_rule_is_static():
    mask = Mask.of_tokens(jnp.arange(3)[None], None, jnp.zeros((1, 3), int), window=2)
    assert len(jax.tree.leaves(mask)) == 3
    assert jax.jit(lambda m: m.window)(mask) == 2
    assert [side for side, _ in mask.arrays()] == ["q", "k", "q"]
    sides = mask.sides("query", "key")
    assert (sides.q_positions_bt, sides.k_positions_bs, sides.until_bt) == ("query", "key", "query")
    assert sides.q_segments_bt is None and sides.window == 2


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (Mask(window=0), "window=0: must be > 0"),
        (Mask(q_positions_bt=np.zeros((2, 5), int)), r"q_positions.shape=\(2, 5\): must be \(2, 3"),
        (Mask(k_positions_bs=np.zeros((1, 4))), "k_positions.dtype='float64': must be an integer"),
        (Mask(k_segments_bs=np.zeros((2, 4), int)), "segments='one of two': queries and keys must"),
        (Mask(until_bt=np.zeros((2, 3), int), causal=False), "until='given': changes nothing"),
    ],
)
def test_refuses(mask, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        mask.whole(2, 3, 4)
