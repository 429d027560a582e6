import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from layers.config import ConfigError
from research.ablation import Claim, Results, difference, judge, mean, ratio
from research.ablation.claims import interval95

numbers = st.lists(st.floats(-100, 100), min_size=2, max_size=6)
RANK = {"not supported": 0, "inconclusive": 1, "supported": 2}


def results(**arms):
    units = {(a, s): {"x": v} for a, vs in arms.items() for s, v in enumerate(vs)}
    return Results(units, range(max(map(len, arms.values()))))


def claim(comparison="<", margin=0.0, measure=None, **more):
    return Claim("c", "statement", "paper", measure or mean("x", "a"), comparison, margin, **more)


def status(values, *args, **more):
    return judge(claim(*args, **more), results(a=values)).status


@pytest.mark.parametrize(
    "values, comparison, margin, expected",
    [
        ([1.0, 1.1, 0.9], "<", 2, "supported"),
        ([1.0, 1.1, 0.9], "<", 0.5, "not supported"),
        ([1.0, 1.1, 0.9], "<", 1.05, "inconclusive"),
        ([1.0, 1.1, 0.9], ">", 0.5, "supported"),
        ([1.0, 1.1, 0.9], ">", 2, "not supported"),
        ([0.01, -0.01, 0.0], "within", 0.1, "supported"),
        ([1.0, 1.1, 0.9], "within", 0.1, "not supported"),
        ([-1.0, -1.1, -0.9], "within", 1.0, "inconclusive"),
        ([0.0, 0.0, 0.0], ">", 0, "inconclusive"),  # equal to the margin is neither side
        ([1.0], "<", 2, "inconclusive"),
        ([1.0, np.nan], "<", 2, "inconclusive"),
        ([1.0, np.inf], ">", 0, "inconclusive"),
    ],
)
def test_status(values, comparison, margin, expected):
    assert status(values, comparison, margin) == expected


@pytest.mark.parametrize(
    "values, comparison, expected",
    [
        ([4.0], "<", "supported"),
        ([4.0, 4.0], ">", "supported"),
        ([4.5], "<", "not supported"),
        ([3.0, 4.0], "<", "inconclusive"),
    ],
)
def test_deterministic_compares_exactly_and_needs_agreement(values, comparison, expected):
    assert status(values, comparison, 4.0, deterministic=True) == expected


@given(numbers)
def test_t_interval_is_scipys(values):
    low, high = interval95(values)
    scale = stats.sem(values)
    if scale > 0:
        want = stats.t.interval(0.95, len(values) - 1, np.mean(values), scale)
        np.testing.assert_allclose((low, high), want, rtol=1e-9, atol=1e-9)
    else:
        assert low == pytest.approx(high)


def test_bootstrap_is_reproducible_and_inside_the_data():
    low, high = interval95([1.0, 2.0, 3.0, 4.0], "bootstrap")
    assert 1 <= low < 2.5 < high <= 4
    assert (low, high) == interval95([1.0, 2.0, 3.0, 4.0], "bootstrap")
    assert interval95([1.0, 1.0], "bootstrap") == (1, 1)


@given(numbers, st.floats(-100, 100), st.floats(0, 50))
def test_a_looser_margin_is_never_a_worse_verdict(values, margin, more):
    assert RANK[status(values, "<", margin)] <= RANK[status(values, "<", margin + more)]
    assert RANK[status(values, ">", margin)] <= RANK[status(values, ">", margin - more)]
    width = abs(margin)
    assert RANK[status(values, "within", width)] <= RANK[status(values, "within", width + more)]


@given(numbers, st.floats(-100, 100))
def test_a_claim_and_its_opposite_are_never_both_supported(values, margin):
    both = {status(values, "<", margin), status(values, ">", margin)}
    assert both in ({"supported", "not supported"}, {"inconclusive"})


@given(numbers, st.floats(-100, 100), numbers)
def test_nothing_is_supported_through_a_gate_that_is_not(values, margin, gating):
    gate = claim(">", 0.0, mean("x", "b"))
    n = min(len(values), len(gating))
    found = results(a=values[:n], b=gating[:n])
    verdict = judge(claim("<", margin, gate=gate), found)
    if judge(gate, found).status != "supported":
        assert verdict.status == "inconclusive" and "gate" in verdict.reason
    else:
        assert verdict.status == judge(claim("<", margin), found).status


def test_missing_units_metrics_and_gates_are_not_run():
    found = results(a=[1.0, 2.0], b=[1.0])
    assert judge(claim(measure=difference("x", "a", "b")), found).reason == (
        "arm 'b' seed 1 is not finished"
    )
    unknown = judge(claim(measure=mean("y", "a")), found)
    assert unknown.status == "not run" and "known: x" in unknown.reason
    gated = judge(claim(gate=claim(measure=mean("x", "b"))), found)
    assert (gated.status, gated.missing) == ("not run", "b")


def test_measures_pair_by_seed():
    found = results(a=[3.0, 6.0], b=[1.0, 3.0])
    np.testing.assert_array_equal(difference("x", "a", "b")(found), [2, 3])
    np.testing.assert_array_equal(ratio("x", "a", "b")(found), [3, 2])


def test_ratio_by_zero_is_inconclusive():
    found = results(a=[1.0, 1.0], b=[0.0, 1.0])
    assert judge(claim(measure=ratio("x", "a", "b")), found).status == "inconclusive"


def test_errors_name_the_field():
    for more, field in (
        (dict(comparison="<="), "comparison"),
        (dict(margin=float("nan")), "margin"),
        (dict(comparison="within", margin=-1), "margin"),
        (dict(interval="z"), "interval"),
    ):
        with pytest.raises(ConfigError, match=f"^{field}="):
            claim(**more)
    with pytest.raises(ConfigError, match="one value for each of 2 seeds"):
        judge(claim(measure=lambda r: 1.0), results(a=[1.0, 2.0]))
