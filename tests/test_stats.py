"""Statistics against hand-computed figures and published tables."""

import math

import numpy as np
import pytest

from pgolf.stats import (
    Paired,
    compare_paired,
    holm,
    incomplete_beta,
    mean_and_error,
    pairs_needed,
    sign_flip_p,
    t_quantile,
    t_two_sided,
    verdict,
)


# Student's t table (NIST/SEMATECH e-Handbook, 1.3.6.7.2), three decimals.
@pytest.mark.parametrize(
    ("probability", "df", "table"),
    [
        (0.975, 1, 12.706),
        (0.975, 2, 4.303),
        (0.95, 3, 2.353),
        (0.975, 4, 2.776),
        (0.995, 5, 4.032),
        (0.975, 9, 2.262),
        (0.999, 10, 4.144),
        (0.90, 15, 1.341),
        (0.995, 30, 2.750),
        (0.975, 100, 1.984),
    ],
)
def test_t_quantile_matches_the_published_table(probability, df, table):
    assert t_quantile(probability, df) == pytest.approx(table, abs=5e-4)
    assert t_quantile(1 - probability, df) == pytest.approx(-table, abs=5e-4)


@pytest.mark.parametrize("t", [0.0, 0.1, 1.0, 3.7, 1e3, 1e8])
def test_t_tail_matches_the_closed_forms_of_one_and_two_degrees(t):
    assert t_two_sided(t, 1) == pytest.approx(1 - 2 / math.pi * math.atan(t), rel=1e-6, abs=1e-12)
    # P(|T| >= t) = 1 - t / sqrt(t^2 + 2), written without cancellation.
    root = math.sqrt(t * t + 2)
    assert t_two_sided(-t, 2) == pytest.approx(2 / (root * (root + t)), rel=1e-9)


def test_t_tail_approaches_the_normal_distribution():
    assert t_two_sided(1.959963985, 1e7) == pytest.approx(0.05, abs=1e-6)
    assert t_two_sided(math.inf, 3) == 0.0


def test_incomplete_beta_matches_the_binomial_sum():
    # I_x(a, b) = P(Binomial(a + b - 1, x) >= a) for whole a, b.
    for a, b, x in [(1, 1, 0.3), (2, 5, 0.1), (7, 3, 0.9), (20, 30, 0.4)]:
        n = a + b - 1
        tail = sum(math.comb(n, k) * x**k * (1 - x) ** (n - k) for k in range(a, n + 1))
        assert incomplete_beta(a, b, x) == pytest.approx(tail, rel=1e-12)
    with pytest.raises(ValueError, match=r"x in \[0, 1\], got 1, 1, 1.5"):
        incomplete_beta(1, 1, 1.5)


def test_sleep_data_of_student_give_his_t_and_p():
    # Student 1908, the hours of extra sleep of ten patients under two drugs: t = -4.0621, p = 0.002833.
    first = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    second = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    pairs = compare_paired(first, second)
    assert pairs.t == pytest.approx(-4.0621, abs=5e-5)
    assert pairs.p_t == pytest.approx(0.002833, abs=5e-7)
    assert (pairs.low, pairs.high) == pytest.approx((-2.4598858, -0.7001142), abs=5e-7)
    assert pairs.p_flip == 4 / 1024  # 9 of 9 nonzero differences agree; the zero doubles both patterns


def test_sign_flip_counts_patterns_by_hand():
    assert sign_flip_p([1, 2, 3]) == 2 / 8
    assert sign_flip_p([3, -1]) == 1.0  # |3 - 1| = 2 is the smallest of all patterns
    assert sign_flip_p([1, 2, -3]) == 1.0
    assert sign_flip_p([1, 2, 4, -1]) == 6 / 16  # |sum| >= 6: 8, 6, 6 and their mirrors
    assert sign_flip_p([0.1] * 5) == 2 / 32
    assert sign_flip_p([0.0, 0.0]) == 1.0


def test_sign_flip_counts_ties_despite_rounding():
    # All orders of the same numbers: 0.1 + 0.2 + 0.3 differs in the last bit by order.
    assert {sign_flip_p(x) for x in ([0.1, 0.2, 0.3], [0.3, 0.2, 0.1], [0.2, 0.3, 0.1])} == {0.25}


def test_sign_flip_by_monte_carlo_agrees_with_the_exact_tail_and_repeats():
    d = np.random.default_rng(3).normal(0.4, 1.0, size=16)
    exact = sign_flip_p(d)
    drawn = sign_flip_p(np.append(d, 0.0))  # a zero changes no sum, but makes n = 17
    assert drawn == pytest.approx(exact, abs=4 * math.sqrt(exact / 100_000))
    assert drawn == sign_flip_p(np.append(d, 0.0))
    assert sign_flip_p([1.0] * 40) == 1 / 100_001  # never zero


def test_holm_matches_a_worked_example():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.7, 0.5]) == [1.0, 1.0]
    assert holm([]) == []
    with pytest.raises(ValueError, match=r"must be in \[0, 1\], got \[nan\]"):
        holm([0.1, math.nan])


def test_mean_and_error_of_few_values():
    m = mean_and_error([1.0, 2.0, 3.0, 4.0])
    assert (m.n, m.mean) == (4, 2.5) and m.se == pytest.approx(math.sqrt(5 / 3) / 2)
    assert math.isnan(mean_and_error([7.0]).se) and math.isnan(mean_and_error([]).mean)
    with pytest.raises(ValueError, match=r"finite numbers, got .*nan.*leave diverged runs out"):
        mean_and_error([1.0, math.nan])


def test_compare_paired_handles_equal_and_too_few_values():
    same = compare_paired([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    assert (same.t, same.p_t, same.p_flip, same.low, same.high) == (0.0, 1.0, 1.0, 0.0, 0.0)
    shifted = compare_paired([2.0, 3.0, 4.0], [1.0, 2.0, 3.0])
    assert (shifted.t, shifted.p_t, shifted.sd) == (math.inf, 0.0, 0.0)
    assert compare_paired([], []).n == 0 and math.isnan(compare_paired([1.5], [1.0]).p_t)
    with pytest.raises(ValueError, match="one value per seed in both arms, got 2 and 1"):
        compare_paired([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="arm must be a list of finite"):
        compare_paired([math.inf], [1.0])


def test_interval_covers_the_truth_as_often_as_it_says():
    random = np.random.default_rng(1)
    hits = 0
    for _ in range(1000):
        p = compare_paired(random.normal(0.3, 1.0, size=4), np.zeros(4))
        hits += p.low <= 0.3 <= p.high
    assert 925 <= hits <= 975  # 950 expected, sd 7


def test_pairs_needed_matches_power_tables():
    # Exact paired t (Cohen 1988, two-sided 5 %, power 0.8): d = 1 -> 10, 0.8 -> 15, 0.5 -> 34, 0.2 -> 199.
    for d, table in [(1.0, 10), (0.8, 15), (0.5, 34), (0.2, 199)]:
        assert abs(pairs_needed(1.0, d) - table) <= 1
    assert pairs_needed(0.0, 0.0005) == 3  # never fewer than carry a claim
    assert pairs_needed(0.00105, 0.0005) == 37
    assert pairs_needed(1.0, 1e-3) == pytest.approx(7_848_882, rel=1e-6)
    with pytest.raises(ValueError, match="effect > 0"):
        pairs_needed(0.1, 0.0)


def paired(n: int, mean: float) -> Paired:
    return Paired(n, mean, 0.1, 0.1, 1.0, 0.0, 0.0, -1.0, 1.0)


def test_verdict_claims_nothing_below_three_pairs_or_above_alpha():
    assert verdict(paired(2, -1.0), 0.0) == "not separable"
    assert verdict(paired(3, -1.0), 0.05) == "better"
    assert verdict(paired(3, 1.0), 0.001) == "worse"
    assert verdict(paired(30, -1.0), 0.0501) == "not separable"
    assert verdict(paired(30, -1.0), math.nan) == "not separable"
