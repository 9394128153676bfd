"""Statistics of paired comparisons: whether an arm is better than the baseline, by how much, or neither.

Pure functions on numpy arrays; no files, no plots. A pair is one seed run with both configurations, so the
seed's share of the noise cancels in the difference (arm minus baseline; negative is better for bits per
byte). The verdict rests on the paired t test, corrected over the arms by Holm's method. The report shows the
sign-flip permutation test next to it, because that assumes no normal distribution. `n` pairs; `df` = n - 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Verdict = Literal["better", "worse", "not separable"]

MIN_PAIRS = 3
"""Fewer pairs never carry a claim: with two, one number estimates the whole spread."""
EXACT_PAIRS = 16
"""Up to here all 2^n sign patterns are enumerated (65,536 for 16)."""
ALPHA = 0.05
"""Two-sided error rate over all arms of an ablation."""


@dataclass(frozen=True)
class Mean:
    """A mean over seeds with its standard error (NaN below two values)."""

    n: int
    mean: float
    se: float


@dataclass(frozen=True)
class Paired:
    """The paired comparison of one arm with the baseline; NaN where `n` is too small for a figure."""

    n: int
    mean: float
    """Mean difference, arm minus baseline."""
    sd: float
    """Standard deviation of the differences."""
    se: float
    """sd / sqrt(n)."""
    t: float
    """mean / se."""
    p_t: float
    """Two-sided p of the paired t test, not corrected."""
    p_flip: float
    """Two-sided p of the sign-flip permutation test, not corrected; at least 2 / 2^n."""
    low: float
    """Lower end of the 1 - alpha confidence interval of the mean difference."""
    high: float
    """Upper end."""


def mean_and_error(values: ArrayLike) -> Mean:
    """Return n, mean and standard error sd / sqrt(n) (sd with n - 1) of finite values.

    Raises:
        ValueError: a value is not finite (a diverged run must not be averaged).
    """
    x = _finite(values, "values")
    mean = float(x.mean()) if x.size else math.nan
    return Mean(int(x.size), mean, _deviation(x) / math.sqrt(x.size) if x.size > 1 else math.nan)


# Student's t distribution is computed here, in four short functions, rather than by scipy: its tail and its
# quantile are all that an ablation needs of scipy, which would be one of the largest dependencies, and the
# standard library's `statistics` has the normal distribution only. Tests compare them with published tables,
# with the closed forms of one and two degrees of freedom, and with the binomial sum.


def incomplete_beta(a: float, b: float, x: float) -> float:
    """Return the regularized incomplete beta function I_x(a, b), to about 1e-14.

    Args:
        a: first shape, > 0. b: second shape, > 0. x: upper limit, in [0, 1].
    Raises:
        ValueError: an argument out of range.
    Source: continued fraction 8.17.22 of the NIST Digital Library of Mathematical Functions, evaluated with
    the modified Lentz method; the symmetry I_x(a, b) = 1 - I_(1-x)(b, a) keeps it convergent.
    """
    if not (a > 0 and b > 0 and 0 <= x <= 1):
        raise ValueError(f"incomplete_beta needs a > 0, b > 0 and x in [0, 1], got {a}, {b}, {x}")
    if x in (0.0, 1.0):
        return x
    if x > (a + 1) / (a + b + 2):
        return 1.0 - incomplete_beta(b, a, 1.0 - x)
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    log_front += a * math.log(x) + b * math.log1p(-x)
    return math.exp(log_front) / (a * _beta_fraction(a, b, x))


def _beta_fraction(a: float, b: float, x: float) -> float:
    """Return 1 + d1/(1 + d2/(1 + ...)) of DLMF 8.17.22."""
    tiny = 1e-300
    value, c, d = 1.0, 1.0, 0.0
    for k in range(1, 10_000):
        m = k // 2
        if k % 2:
            term = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            term = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        d = 1.0 / ((1.0 + term * d) or tiny)
        c = (1.0 + term / c) or tiny
        value *= c * d
        if abs(c * d - 1.0) < 1e-15:
            break
    return value


def t_two_sided(t: float, df: float) -> float:
    """Return P(|T| >= |t|) of Student's t with `df` degrees of freedom: I_(df / (df + t^2))(df / 2, 1 / 2).

    Raises:
        ValueError: df <= 0 or t is NaN.
    """
    if not df > 0 or math.isnan(t):
        raise ValueError(f"t_two_sided needs df > 0 and a number t, got df={df}, t={t}")
    return 0.0 if math.isinf(t) else incomplete_beta(df / 2, 0.5, df / (df + t * t))


def t_quantile(probability: float, df: float) -> float:
    """Return q with P(T <= q) = `probability` of Student's t, by bisection (relative error below 1e-12).

    Raises:
        ValueError: probability outside (0, 1), or df <= 0.
    """
    if not 0 < probability < 1:
        raise ValueError(f"t_quantile: probability must be in (0, 1), got {probability}")
    if probability < 0.5:
        return -t_quantile(1 - probability, df)
    tail = 2 * (1 - probability)
    low, high = 0.0, 1.0
    while t_two_sided(high, df) > tail:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if t_two_sided(middle, df) > tail else (low, middle)
    return (low + high) / 2


def sign_flip_p(differences: ArrayLike, *, draws: int = 100_000, seed: int = 0) -> float:
    """Return the two-sided p of the sign-flip permutation test of mean zero.

    If the arm changes nothing, each difference is as likely with the opposite sign: p is the share of sign
    patterns whose |sum| is at least the observed one. All 2^n patterns up to n = 16 (the smallest p is
    2 / 2^n: fewer than 6 pairs cannot reach 0.05), above that `draws` seeded ones, (hits + 1) / (draws + 1).

    Args:
        differences: `(n,)` finite differences.
        draws: patterns drawn for n > 16. seed: of their generator.
    Raises:
        ValueError: no differences, or one is not finite.
    Source: Fisher, The Design of Experiments (1935), section 21.
    """
    x = _finite(differences, "differences")
    if x.size == 0:
        raise ValueError("sign_flip_p needs at least one difference, got none")
    # Sums of the same numbers in another order differ by rounding: ties must count as ties.
    bar = abs(float(x.sum())) - 1e-12 * float(np.abs(x).sum())
    if x.size <= EXACT_PAIRS:
        patterns = (np.arange(2**x.size)[:, None] >> np.arange(x.size)) & 1  # (2^n, n)
        return float(np.mean(np.abs((2 * patterns - 1) @ x) >= bar))
    random = np.random.default_rng(seed)
    hits, done = 0, 0
    while done < draws:
        count = min(10_000, draws - done)
        signs = 2 * random.integers(0, 2, size=(count, x.size)) - 1
        hits += int(np.count_nonzero(np.abs(signs @ x) >= bar))
        done += count
    return (hits + 1) / (draws + 1)


def compare_paired(arm: ArrayLike, baseline: ArrayLike, *, alpha: float = ALPHA) -> Paired:
    """Compare an arm with the baseline, seed by seed.

    t = mean(d) / (sd(d) / sqrt(n)) with d = arm - baseline, df = n - 1; the interval is
    mean(d) +- t_quantile(1 - alpha / 2, n - 1) * sd / sqrt(n). Equal differences give t = +-inf and p = 0,
    all zero t = 0 and p = 1.

    Args:
        arm: `(n,)` results, one per seed. baseline: `(n,)` results of the same seeds in the same order.
        alpha: two-sided error rate of the interval, in (0, 1).
    Raises:
        ValueError: lengths differ, a value is not finite, or alpha is out of range.
    """
    a, b = _finite(arm, "arm"), _finite(baseline, "baseline")
    if a.shape != b.shape:
        raise ValueError(f"compare_paired needs one value per seed in both arms, got {a.size} and {b.size}")
    if not 0 < alpha < 1:
        raise ValueError(f"compare_paired: alpha must be in (0, 1), got {alpha}")
    d = a - b
    n, nan = int(d.size), math.nan
    if n < 2:
        only = float(d[0]) if n else nan
        return Paired(n, only, nan, nan, nan, nan, sign_flip_p(d) if n else nan, nan, nan)
    mean, sd = float(d.mean()), _deviation(d)
    se = sd / math.sqrt(n)
    t = mean / se if se else math.copysign(math.inf, mean) if mean else 0.0
    reach = t_quantile(1 - alpha / 2, n - 1) * se
    return Paired(n, mean, sd, se, t, t_two_sided(t, n - 1), sign_flip_p(d), mean - reach, mean + reach)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's adjusted p values, in the order given.

    Sorted upwards, the i-th of m (from 0) becomes max over j <= i of min(1, (m - j) * p_j): rejecting where
    it is at most alpha keeps the chance of any false claim below alpha.

    Raises:
        ValueError: a value outside [0, 1].
    Source: Holm, A simple sequentially rejective multiple test procedure, Scand. J. Statist. 6 (1979).
    """
    bad = [p for p in p_values if not 0 <= p <= 1]
    if bad:
        raise ValueError(f"holm: p values must be in [0, 1], got {bad}")
    adjusted, worst = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        worst = max(worst, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = worst
    return adjusted


def pairs_needed(sd: float, effect: float, *, power: float = 0.8, alpha: float = ALPHA) -> int:
    """Return the pairs that a two-sided paired t test needs to see `effect` with probability `power`.

    The smallest n >= 3 with n >= ((t(1 - alpha/2, n - 1) + t(power, n - 1)) * sd / effect)^2: the usual
    approximation of the noncentral t, within one pair of exact tables for n >= 5.

    Args:
        sd: standard deviation of the paired differences, >= 0. effect: mean difference to see, > 0.
        power: probability of seeing it, in (0.5, 1). alpha: two-sided error rate, in (0, 1).
    Raises:
        ValueError: an argument out of range.
    """
    if not (sd >= 0 and math.isfinite(sd) and effect > 0 and 0.5 < power < 1 and 0 < alpha < 1):
        raise ValueError(
            "pairs_needed needs a finite sd >= 0, effect > 0, power in (0.5, 1) and alpha in (0, 1), "
            f"got {sd}, {effect}, {power}, {alpha}"
        )

    def enough(n: int) -> bool:
        reach = t_quantile(1 - alpha / 2, n - 1) + t_quantile(power, n - 1)
        return n >= (reach * sd / effect) ** 2

    low, high = MIN_PAIRS - 1, MIN_PAIRS  # the answer lies in (low, high]; the quantiles fall with n
    while not enough(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def verdict(pairs: Paired, p_adjusted: float, *, alpha: float = ALPHA) -> Verdict:
    """Return what may be said of an arm whose metric is better when smaller.

    "better" or "worse" needs at least three pairs and an adjusted p of at most `alpha`; everything else is
    "not separable", which is not a proof of equality: the interval says what remains possible.
    """
    if pairs.n < MIN_PAIRS or not p_adjusted <= alpha or pairs.mean == 0:
        return "not separable"
    return "better" if pairs.mean < 0 else "worse"


def _finite(values: ArrayLike, name: str) -> NDArray[np.float64]:
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or not np.isfinite(x).all():
        raise ValueError(
            f"{name} must be a list of finite numbers, got {x.tolist()}; leave diverged runs out"
        )
    return x


def _deviation(x: NDArray[np.float64]) -> float:
    """Standard deviation with n - 1; exactly 0 for equal values (their mean may be rounded)."""
    return 0.0 if (x == x[0]).all() else float(x.std(ddof=1))
