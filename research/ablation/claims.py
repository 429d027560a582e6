"""Claims and their verdicts: an interval over seeds against a margin fixed before the run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from layers.config import ConfigError, check, check_choice
from research.ablation.results import NotRun, Results

SUPPORTED = "supported"
NOT_SUPPORTED = "not supported"
INCONCLUSIVE = "inconclusive"
NOT_RUN = "not run"
STATUSES = (SUPPORTED, NOT_SUPPORTED, INCONCLUSIVE, NOT_RUN)

Measure = Callable[[Results], np.ndarray]


@dataclass(frozen=True)
class Claim:
    """A statement with a measure, a comparison and a margin.

    Attributes:
      name, statement: the short name and the sentence.
      paper: the paper's number, with its table, figure or section.
      measure: a function from results to one value per seed.
      comparison: "<" or ">": the mean is below or above ``margin``; "within": it is in ±margin.
      margin: the number that the mean is compared with; fixed before the run.
      gate: a condition that must be supported for this claim to mean anything.
      interval: "t" (Student's) or "bootstrap" (percentiles of resampled means), both 95%.
      deterministic: the measure has no noise (bytes, shapes): one seed is enough, all seeds must
        agree, and a value equal to the margin is supported ("at most").
    """

    name: str
    statement: str
    paper: str
    measure: Measure
    comparison: str
    margin: float
    gate: "Claim | None" = None
    interval: str = "t"
    deterministic: bool = False

    def __post_init__(self):
        check_choice("comparison", self.comparison, ("<", ">", "within"))
        check_choice("interval", self.interval, ("t", "bootstrap"))
        check(callable(self.measure), "measure", self.measure, "must be a function of results")
        number = isinstance(self.margin, (int, float)) and np.isfinite(self.margin)
        check(bool(number), "margin", self.margin, "must be a finite number")
        valid = self.comparison != "within" or self.margin >= 0
        check(valid, "margin", self.margin, "must be ≥ 0 with comparison 'within'")


@dataclass(frozen=True)
class Verdict:
    """The verdict of a run on a claim; a number that could not be computed is None.

    Attributes:
      status: one of `STATUSES`.
      reason: a sentence that explains the status.
      mean, low, high: the mean of the measure over seeds, and its 95% interval.
      seeds: the number of seeds.
      values: the measure of each seed.
      missing: for a claim that was not run, the first arm that it requires and that is missing.
    """

    status: str
    reason: str
    mean: float | None = None
    low: float | None = None
    high: float | None = None
    seeds: int = 0
    values: tuple[float, ...] = ()
    missing: str | None = None


def difference(metric: str, arm: str, other: str, other_metric: str | None = None) -> Measure:
    """``metric`` of ``arm`` minus that (or ``other_metric``) of ``other``, paired by seed."""
    return lambda results: (
        results.metric(arm, metric) - results.metric(other, other_metric or metric)
    )


def ratio(metric: str, arm: str, other: str, other_metric: str | None = None) -> Measure:
    """``metric`` of ``arm`` divided by that (or ``other_metric``) of ``other``, paired by seed."""
    return lambda results: np.divide(
        results.metric(arm, metric), results.metric(other, other_metric or metric)
    )


def mean(metric: str, arm: str) -> Measure:
    """``metric`` of ``arm``; the claim compares its mean."""
    return lambda results: results.metric(arm, metric)


def interval95(values: Sequence[float], method: str = "t") -> tuple[float, float]:
    """95% confidence interval of the mean of two or more ``values``.

    ``t``: mean ± t₀.₉₇₅(n−1)·s/√n. ``bootstrap``: percentiles of 9,999 resampled means.
    """
    from scipy import stats  # slow to import: not part of `ablate --help`

    sample = np.asarray(values, np.float64)
    check(sample.ndim == 1 and len(sample) > 1, "values", values, "must be two or more numbers")
    if method == "bootstrap":
        interval = stats.bootstrap(
            (sample,), np.mean, confidence_level=0.95, method="percentile", rng=0
        ).confidence_interval
        return float(interval.low), float(interval.high)
    half = stats.t.ppf(0.975, len(sample) - 1) * sample.std(ddof=1) / np.sqrt(len(sample))
    return float(sample.mean() - half), float(sample.mean() + half)


def judge(claim: Claim, results: Results) -> Verdict:
    """The verdict on ``claim``.

    Supported: the whole interval is on the claim's side of the margin. Not supported: the whole
    interval is on the other side. Inconclusive: the interval contains or touches the margin, there
    is only one seed, a value is not finite, or the gate is not supported. Not run: a unit or a
    metric that the claim requires is missing.

    Raises:
      ConfigError: ``measure`` does not return one value per seed.
    """
    try:
        with np.errstate(all="ignore"):  # a division by 0 is reported below as not finite
            values = np.asarray(claim.measure(results), np.float64)
    except NotRun as missing:
        return Verdict(NOT_RUN, str(missing), missing=missing.arm)
    if values.shape != (len(results.seeds),):
        raise ConfigError(
            f"claim {claim.name!r}: measure returned shape {values.shape}, "
            f"must be one value for each of {len(results.seeds)} seeds"
        )
    numbers = tuple(float(v) for v in values)
    if not numbers:
        return Verdict(NOT_RUN, "no seeds")
    if not np.all(np.isfinite(values)):
        seed = results.seeds[int(np.argmin(np.isfinite(values)))]
        return Verdict(
            INCONCLUSIVE, f"seed {seed} is not finite", seeds=len(numbers), values=numbers
        )
    low = high = average = float(values.mean())
    if claim.deterministic:
        low, high = float(values.min()), float(values.max())
        status, reason = _compare_exact(claim, low, high)
    elif len(numbers) == 1:
        status, reason = INCONCLUSIVE, "one seed has no interval"
    else:
        low, high = interval95(numbers, claim.interval)
        status, reason = _compare(claim, low, high)
    missing_arm = None
    if claim.gate is not None:
        gate = judge(claim.gate, results)
        missing_arm = gate.missing
        if gate.status == NOT_RUN:
            status, reason = NOT_RUN, f"gate {claim.gate.name!r}: {gate.reason}"
        elif gate.status != SUPPORTED:
            status = INCONCLUSIVE
            reason = f"gate {claim.gate.name!r} is {gate.status}: {gate.reason}"
    bounds = (None, None) if len(numbers) == 1 and not claim.deterministic else (low, high)
    return Verdict(status, reason, average, *bounds, len(numbers), numbers, missing_arm)


def target(claim: Claim) -> str:
    """The comparison in symbols: ``< 0.02``, ``> 1.5``, ``within ±0.1``."""
    if claim.comparison == "within":
        return f"within ±{claim.margin:g}"
    exact = {"<": "≤", ">": "≥"} if claim.deterministic else {}
    return f"{exact.get(claim.comparison, claim.comparison)} {claim.margin:g}"


def _claimed_range(claim: Claim) -> tuple[float, float]:
    """The open interval that the mean is in if the claim is true."""
    if claim.comparison == "within":
        return -claim.margin, claim.margin
    return (-np.inf, claim.margin) if claim.comparison == "<" else (claim.margin, np.inf)


def _compare(claim: Claim, low: float, high: float) -> tuple[str, str]:
    lower, upper = _claimed_range(claim)
    interval = f"[{low:.4g}, {high:.4g}]"
    if lower < low and high < upper:
        return SUPPORTED, f"the interval {interval} is {target(claim)}"
    if high < lower or low > upper:
        return NOT_SUPPORTED, f"the interval {interval} is not {target(claim)}"
    return INCONCLUSIVE, f"the interval {interval} straddles the margin {target(claim)}"


def _compare_exact(claim: Claim, low: float, high: float) -> tuple[str, str]:
    if low != high:
        return INCONCLUSIVE, f"declared deterministic, but seeds range from {low:.6g} to {high:.6g}"
    lower, upper = _claimed_range(claim)
    if lower <= low <= upper:
        return SUPPORTED, f"{low:.6g} is {target(claim)}"
    return NOT_SUPPORTED, f"{low:.6g} is not {target(claim)}"
