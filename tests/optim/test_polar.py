"""Coefficient tables: generator against published numbers, quality of the scalar maps, error texts."""

import statistics

import pytest

from pgolf.optim.polar import (
    NAMES,
    POLAR_EXPRESS_GOLF,
    check_converges,
    coefficients,
    golf_lower,
    named_tables,
    polar_express,
    quality,
    scalar_map,
    slope,
)

# Polar Express (arXiv 2505.16932), the list in its reference code; its eighth row is the limit (15/8, -5/4,
# 3/8).
PAPER = [
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
]


def assert_tables_close(got, expected, tolerance):
    assert len(got) == len(expected)
    worst = max(abs(a - b) for g, e in zip(got, expected, strict=True) for a, b in zip(g, e, strict=True))
    assert worst <= tolerance, f"largest difference {worst}"


def test_generator_reproduces_paper_table():
    assert_tables_close(polar_express(1e-3, 6), PAPER[:6], 1e-12)
    # The seventh interval is [1 - 4e-7, 1 + 4e-7]: the linear system is nearly singular, so both lists carry
    # noise.
    assert_tables_close(polar_express(1e-3, 7), PAPER, 1e-11)


def test_generator_reproduces_golf_table():
    assert_tables_close(polar_express(1e-3, 5, cushion=0.02, safety=1.02), POLAR_EXPRESS_GOLF, 1e-12)


def test_generator_ends_at_the_taylor_polynomial():
    assert_tables_close(polar_express(1e-3, 10)[-1:], [(15 / 8, -10 / 8, 3 / 8)], 1e-12)


@pytest.mark.parametrize(
    ("lower", "steps", "worst", "tolerance"),
    # Largest |1 - s| that n minimax steps leave of [lower, 1], derived independently of this code: half the
    # width of the last interval, to the digits that were noted.
    [
        (1e-4, 3, 0.986, 6e-4),
        (1e-4, 4, 0.942, 6e-4),
        (1e-4, 5, 0.780, 6e-4),
        (1e-4, 6, 0.381, 6e-4),
        (1e-3, 3, 0.866, 6e-4),
        (1e-3, 4, 0.560, 6e-4),
        (1e-3, 5, 0.124, 6e-4),
        (1e-3, 6, 0.0012, 6e-5),
        (5e-3, 3, 0.502, 6e-4),
        (5e-3, 4, 0.087, 6e-4),
        (5e-3, 5, 0.0004, 6e-5),
        (5e-3, 6, 0, 1e-10),
        (1e-2, 3, 0.274, 6e-4),
        (1e-2, 4, 0.013, 6e-4),
        (1e-2, 5, 0, 2e-6),
        (1e-2, 6, 0, 1e-14),
    ],
)
def test_generated_interval_is_centred_and_as_wide_as_known(lower, steps, worst, tolerance):
    got = quality(polar_express(lower, steps), lower)
    assert 1 - got.low == pytest.approx(worst, abs=tolerance)
    assert got.high == pytest.approx(2 - got.low, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "steps", "low", "high", "rms", "growth"),
    # Computed once by another program, for singular values log-uniform in [3e-3, 1].
    [
        ("jordan", 5, 0.68, 1.20, 0.19, 485),
        ("jordan", 4, 0.41, 1.20, 0.23, 141),
        ("polar_express_golf", 5, 0.859, 1.141, 0.094, 989),
        ("polar_express_refit", 5, 0.992, 1.008, 0.005, 537),
        ("polar_express_golf_truncated", 4, 0.42, 1.58, 0.39, 422),
    ],
)
def test_quality_matches_the_known_rows(name, steps, low, high, rms, growth):
    table = coefficients(name, steps)
    got = quality(table)
    assert got[0] == pytest.approx(low, abs=6e-3)
    assert got[1] == pytest.approx(high, abs=6e-3)
    assert got[2] == pytest.approx(rms, abs=6e-3)
    assert slope(table) == pytest.approx(growth, rel=3e-3)


@pytest.mark.parametrize(
    ("name", "steps", "mean", "variation", "narrow"),
    # Noted with 3 digits from an independent program; `narrow` is the variation over [5e-3, 0.3], where most
    # singular values lie.
    [
        ("jordan", 5, 0.92, 0.188, 0.171),
        ("jordan", 4, 0.88, 0.221, 0.176),
        ("polar_express_golf", 5, 1.00, 0.094, 0.092),
        ("polar_express_golf_truncated", 4, 1.06, 0.365, 0.388),
    ],
)
def test_mean_and_variation_match_the_known_rows(name, steps, mean, variation, narrow):
    table = coefficients(name, steps)
    got = quality(table)
    assert got.mean == pytest.approx(mean, abs=6e-3)
    assert got.variation == pytest.approx(variation, abs=1e-3)
    assert got.rms**2 == pytest.approx((got.mean * got.variation) ** 2 + (got.mean - 1) ** 2)
    out = [scalar_map(table, 5e-3 * 60 ** (i / 4000)) for i in range(4001)]
    assert statistics.pstdev(out) / statistics.mean(out) == pytest.approx(narrow, abs=1.5e-3)


@pytest.mark.parametrize("lower", [0.0, 1.0, -1.0])
def test_quality_rejects_an_empty_interval(lower):
    with pytest.raises(ValueError, match=rf"lower must be in \(0, 1\), got {lower}"):
        quality([(2.0, -1.5, 0.5)], lower)


def test_slope_is_the_growth_of_small_values():
    for name in NAMES:
        table = coefficients(name, 5)
        assert scalar_map(table, 1e-9) / 1e-9 == pytest.approx(slope(table), rel=1e-9)


@pytest.mark.parametrize(("lower", "rms"), [(0.005, 0.094), (0.003, 0.147)])
def test_quality_of_generated_four_step_tables_matches_the_known_rows(lower, rms):
    assert quality(polar_express(lower, 4))[2] == pytest.approx(rms, abs=1e-3)


def test_golf_with_five_steps_is_the_published_table_bit_for_bit():
    assert coefficients("polar_express_golf", 5) == POLAR_EXPRESS_GOLF


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_golf_with_fewer_steps_is_solved_not_cut(steps):
    solved, cut = (
        coefficients("polar_express_golf", steps),
        coefficients("polar_express_golf_truncated", steps),
    )
    assert len(solved) == len(cut) == steps
    assert quality(solved)[2] < 0.97 * quality(cut)[2]
    nearby = [
        quality(polar_express(golf_lower(steps) * f, steps, cushion=0.02, safety=1.02), points=2001)[2]
        for f in (0.9, 1.1)
    ]
    assert quality(solved, points=2001)[2] <= min(nearby), "golf_lower is not where the RMS is smallest"


def test_golf_with_four_steps_is_nearly_as_good_as_five():
    assert quality(coefficients("polar_express_golf", 4))[2] < 0.11
    assert quality(coefficients("polar_express_golf_truncated", 4))[2] > 0.38


@pytest.mark.parametrize("steps", [1, 5])
def test_margin_is_the_published_list_on_smaller_values(steps):
    shrunk, table = coefficients("polar_express_margin", steps), POLAR_EXPRESS_GOLF[:steps]
    for value in (0.003, 0.4, 1.0):
        assert scalar_map(shrunk, value) == pytest.approx(scalar_map(table, value / 1.02), rel=1e-12)


@pytest.mark.parametrize("steps", [6, 10])
def test_golf_with_more_steps_converges(steps):
    low, high, *_ = quality(coefficients("polar_express_golf", steps), 1e-3)
    assert len(coefficients("polar_express_golf", steps)) == steps
    assert 1 - low < 2.4e-3
    assert high - 1 < 2.4e-3
    assert coefficients("polar_express_golf_truncated", steps) == POLAR_EXPRESS_GOLF


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("you", "cans")])
def test_every_table_has_the_asked_number_of_steps(name):
    assert [len(coefficients(name, n)) for n in (1, 4, 5)] == [1, 4, 5]


@pytest.mark.parametrize(("name", "low", "high"), [("you", 0.475, 1.145), ("cans", 0.884, 1.120)])
def test_published_lists_behave_as_known(name, low, high):
    # Computed once by another program, for singular values in [1e-3, 1]; catches a mistyped digit.
    got = quality(coefficients(name, 5), 1e-3)
    assert got[:2] == (pytest.approx(low, abs=1e-3), pytest.approx(high, abs=1e-3))


def test_scalar_map_is_odd_and_keeps_zero():
    table = coefficients("polar_express_golf", 5)
    assert scalar_map(table, 0.0) == 0.0
    assert scalar_map(table, -0.3) == -scalar_map(table, 0.3)
    assert scalar_map([(2.0, -1.0, 0.5)], 2.0) == 2 * 2 - 8 + 16


def test_named_tables_have_the_asked_steps_where_they_can():
    tables = named_tables(4)
    assert tuple(tables) == NAMES
    assert {n: len(t) for n, t in tables.items()} == {n: 5 if n in ("you", "cans") else 4 for n in NAMES}
    assert tables["polar_express_golf"] == coefficients("polar_express_golf", 4)


def test_coefficients_rejects_what_it_does_not_have():
    with pytest.raises(ValueError, match=r"must be one of \('jordan', .*'polar_express_golf'.*got 'polar'"):
        coefficients("polar", 5)
    with pytest.raises(ValueError, match=r"steps must be >= 1, got 0"):
        coefficients("jordan", 0)
    with pytest.raises(ValueError, match=r"'you' exist for 5 steps only, got steps=4; use"):
        coefficients("you", 4)


@pytest.mark.parametrize(
    "bad", [{"lower": 0.0}, {"lower": 1.0}, {"steps": 0}, {"cushion": 1.0}, {"safety": 0.9}]
)
def test_generator_rejects_arguments_out_of_range(bad):
    arguments = {"lower": 1e-3, "steps": 5, "cushion": 0.02, "safety": 1.0} | bad
    name = next(iter(bad))
    with pytest.raises(ValueError, match=rf"polar_express: .*{name}.*got.*{bad[name]}"):
        polar_express(arguments.pop("lower"), arguments.pop("steps"), **arguments)


@pytest.mark.parametrize("steps", range(1, 11))
def test_named_tables_converge(steps):
    for table in named_tables(steps).values():
        check_converges(tuple(table))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (((3.4445, 4.7750, 2.0315),), r"iteration 0, .* to 10.25, more than 10"),
        (((1.5, -0.5, 0.0), (-12.0, 0.0, 0.0)), r"iteration 1, .* to -12, more than 10"),
        (((1.0, float("nan"), 0.0),), "diverge: iteration 0, .* to nan"),
    ],
)
def test_diverging_table_is_refused_and_names_the_step(table, message):
    with pytest.raises(ValueError, match=message):
        check_converges(table)
