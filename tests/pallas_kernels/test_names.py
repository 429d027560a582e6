"""What an error says of a name that is not known."""

import pytest

from pallas_kernels.names import did_you_mean, one_of, suggest

KNOWN = ("reference", "xla", "tpu", "gpu")


@pytest.mark.parametrize(
    "name, near",
    [("tpus", "did you mean 'tpu'?"), ("referense", "did you mean 'reference'?"), ("cuda", "")],
)
def test_the_nearest_name_is_suggested(name, near):
    assert did_you_mean(name, KNOWN) == near
    assert suggest(name, KNOWN) == (near or "known: reference, xla, tpu, gpu")
    assert one_of(name, iter(KNOWN)) == "one of reference, xla, tpu, gpu" + (
        f" ({near})" if near else ""
    )


def test_any_value_is_a_name():
    assert suggest(3, {"x": 1}) == "known: x"
    assert suggest("x", []) == "known: none"
