"""ALiBi slopes against the paper, BLOOM and MPT."""

import numpy as np
import pytest

from layers import alibi


def test_eight_heads_are_the_papers():
    np.testing.assert_array_equal(alibi.slopes(8), [2.0**-i for i in range(1, 9)])


@pytest.mark.parametrize("heads", [1, 2, 3, 6, 8, 12, 16, 20, 112])
def test_slopes_match_bloom(heads):
    torch = pytest.importorskip("torch")
    bloom = pytest.importorskip("transformers.models.bloom.modeling_bloom")
    bias = bloom.build_alibi_tensor(torch.ones(1, 4), heads, torch.float32)
    want = bias.numpy()[:, 0, 1]  # slope × position 1
    got = alibi.slopes(heads)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize("heads", [1, 3, 4, 6, 12, 20, 112])
@pytest.mark.parametrize("largest", [8, 16, 5])
def test_slopes_match_mpt(heads, largest):
    pytest.importorskip("torch")
    mpt = pytest.importorskip("transformers.models.mpt.modeling_mpt")
    bias = mpt.build_mpt_alibi_tensor(heads, 2, alibi_bias_max=largest)
    want = -bias.numpy()[:, 0, 0]  # the key is one token before the query
    np.testing.assert_allclose(alibi.slopes(heads, largest), want, rtol=1e-6)
