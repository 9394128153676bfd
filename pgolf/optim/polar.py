"""Coefficients of the polar iteration: published tables, and the generator that reproduces them.

One iteration maps every singular value s of X to p(s) = a s + b s^3 + c s^5 (X <- aX + bAX + cA^2 X with
A = XX^T). A table is the list of the triples (a, b, c), first iteration first. A good table moves all
singular values in [lower, 1] close to 1 in few iterations. All coefficients of the package are in this file,
which uses plain numbers only, no tensors. "steps" in names and messages are iterations.

Sources: Polar Express, arXiv 2505.16932, and its reference code; each table names its own source.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

from pgolf.errors import UserError

Coefficients = tuple[float, float, float]

# Keller Jordan, "Muon" (https://kellerjordan.github.io/posts/muon/); the same triple in every iteration, not
# convergent by design.
JORDAN: Coefficients = (3.4445, -4.7750, 2.0315)

# You Jiacheng (https://x.com/YouJiacheng/status/1893704552689303901), as used by modded-nanogpt and dion.
YOU: tuple[Coefficients, ...] = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)

# CANS, arXiv 2506.10935: Remez with an adaptive interval.
CANS: tuple[Coefficients, ...] = (
    (8.4703, -25.1081, 18.6293),
    (4.1828, -3.1087, 0.5806),
    (3.9619, -2.9541, 0.5630),
    (3.2866, -2.4647, 0.5074),
    (2.2737, -1.6447, 0.4162),
)

# modded-nanogpt, "num_iters=5, safety_factor=2e-2, cushion=2"; used by every published record run that has
# Polar Express. Equals polar_express(1e-3, 5, cushion=0.02, safety=1.02) to 1e-12 (tested); written out so
# that such a run can be repeated bit for bit.
POLAR_EXPRESS_GOLF: tuple[Coefficients, ...] = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)

# Tables that exist for one number of iterations only.
_FIXED = {"you": YOU, "cans": CANS}
NAMES = (
    "jordan",
    "you",
    "cans",
    "polar_express",
    "polar_express_golf",
    "polar_express_golf_truncated",
    "polar_express_margin",
    "polar_express_refit",
)
MARGIN = 1.02
"""Factor by which PR #1516 divides in addition to the norm."""


@functools.lru_cache(maxsize=64)
def coefficients(name: str, steps: int) -> tuple[Coefficients, ...]:
    """Return the table `name` for `steps` iterations, first iteration first.

    - `jordan`: one triple repeated, for any number of iterations.
    - `you`, `cans`: published lists for five iterations only.
    - `polar_express`: the recipe of the paper (lower 1e-3, its cushion, no safety factor), for any number.
    - `polar_express_golf`: the table of PR #1855 for five iterations. For other numbers the same recipe
      (cushion 0.02, safety 1.02, last iteration unscaled) is solved on an interval that so many iterations
      can map close to 1 (`golf_lower`); cutting the published list short would leave singular values
      anywhere in [0.42, 1.58].
    - `polar_express_golf_truncated`: the published behaviour `table[:steps]`, for comparison; it has five
      iterations at most.
    - `polar_express_margin`: the same list after a division by `MARGIN`, as in PR #1516: the first
      polynomial p(x) becomes p(x / 1.02).
    - `polar_express_refit`: as `polar_express_golf` below five iterations. From five on it is the same
      recipe solved on [3e-3, 1], because smaller singular values are rare: the RMS deviation from 1 on that
      interval is 0.005, compared with 0.094 if it is solved on [1e-3, 1].

    Raises:
        ValueError: the name is unknown, steps < 1, or the table does not exist for this number of steps.
    """
    if steps < 1:
        raise UserError(f"polar coefficients: steps must be >= 1, got {steps}")
    if name == "jordan":
        return (JORDAN,) * steps
    if name in _FIXED:
        table = _FIXED[name]
        if steps != len(table):
            raise UserError(
                f"polar coefficients {name!r} exist for {len(table)} steps only, got steps={steps}; "
                "use 'polar_express_golf', which is solved for any number"
            )
        return table
    if name == "polar_express":
        return tuple(polar_express(1e-3, steps))
    if name == "polar_express_golf":
        if steps == len(POLAR_EXPRESS_GOLF):
            return POLAR_EXPRESS_GOLF
        return tuple(polar_express(golf_lower(steps), steps, cushion=0.02, safety=1.02))
    if name == "polar_express_golf_truncated":
        return POLAR_EXPRESS_GOLF[:steps]
    if name == "polar_express_margin":
        (a, b, c), *rest = POLAR_EXPRESS_GOLF[:steps]
        return ((a / MARGIN, b / MARGIN**3, c / MARGIN**5), *rest)
    if name == "polar_express_refit":
        return tuple(polar_express(max(golf_lower(steps), 3e-3), steps, cushion=0.02, safety=1.02))
    raise UserError(f"polar coefficients must be one of {NAMES}, got {name!r}")


def named_tables(steps: int) -> dict[str, tuple[Coefficients, ...]]:
    """Return all tables by name for `steps` iterations; tables of fixed length keep their length."""
    return {name: coefficients(name, len(_FIXED.get(name, ())) or steps) for name in NAMES}


def golf_lower(steps: int) -> float:
    """Return the lower end of the interval on which `polar_express_golf` is solved for `steps` iterations.

    From five iterations on it is the published 1e-3. Fewer iterations cannot serve that interval, and a table
    solved for it would differ from the published list only in its last polynomial; so the lower end is
    raised. The values minimize the RMS deviation from 1 over log-uniform s in [3e-3, 1] (see `quality`).
    """
    return {1: 0.087, 2: 0.033, 3: 0.0115, 4: 0.005}.get(steps, 1e-3)


def polar_express(
    lower: float, steps: int, *, cushion: float = 0.02407327424182761, safety: float = 1.0
) -> list[Coefficients]:
    """Return the greedy minimax composition of `steps` odd quintics that maps [lower, 1] close to 1.

    Iteration t starts with the interval [l, u] that iteration t - 1 leaves. It minimizes max |1 - p(x)| over
    (a, b, c) on [max(l, cushion * u), u]; a wider interval would make p small inside it and amplify rounding
    errors. Then p is scaled by 2 / (p(l) + p(u)), which centres the image of [l, u] on 1: l <- p(l),
    u <- 2 - l. All polynomials except for the last become p(x / safety), so that values up to safety * u are
    tolerated; the next interval takes that into account.

    Args:
        lower: smallest singular value after normalization that should be mapped close to 1, in (0, 1).
        steps: number of iterations, >= 1.
        cushion: smallest l / u for which a polynomial is solved, in [0, 1).
        safety: factor >= 1; PR #1855 uses 1.02.

    Raises:
        ValueError: an argument is out of range.

    Source: Polar Express (arXiv 2505.16932), algorithm 2 and its code; the defaults give the paper's table.
    """
    if not 0 < lower < 1:
        raise UserError(f"polar_express: lower must be in (0, 1), got {lower}")
    if steps < 1 or not 0 <= cushion < 1 or not safety >= 1:
        raise UserError(
            "polar_express: expected steps >= 1, cushion in [0, 1), safety >= 1, "
            f"got steps={steps}, cushion={cushion}, safety={safety}"
        )
    table: list[Coefficients] = []
    low, high = lower, 1.0
    for step in range(steps):
        poly = _minimax_quintic(max(low, cushion * high), high)
        gain = 2.0 / (_value(poly, low) + _value(poly, high))
        k = safety if step < steps - 1 else 1.0
        a, b, c = (gain * v for v in poly)
        table.append((a / k, b / k**3, c / k**5))
        low = _value(table[-1], low)
        high = 2.0 - low
    return table


def scalar_map(table: Sequence[Coefficients], s: float) -> float:
    """Return the value to which the iterations of `table` map the singular value `s`, without rounding."""
    for poly in table:
        s = _value(poly, s)
    return s


DIVERGES_ABOVE = 10.0
"""Largest singular value that an iteration may produce. From a larger one the next polynomial, of degree
five, would reach thousands. Common tables stay below 2; the limit is wide because few singular values are
near 1, where a table may overshoot. (The float16 products of the Gram form are accurate up to 8.)"""


@functools.lru_cache(maxsize=64)
def check_converges(table: tuple[Coefficients, ...]) -> None:
    """Check that the iterations of `table` keep all singular values of [0, 1] below `DIVERGES_ABOVE`.

    Raises:
        ValueError: an iteration maps one of 2,001 values in [0, 1] above it, or a coefficient is not finite.
    """
    values = [i / 2000 for i in range(2001)]
    for step, poly in enumerate(table):
        values = [_value(poly, s) for s in values]
        worst = max(values, key=abs) if all(map(math.isfinite, values)) else math.nan
        if not abs(worst) <= DIVERGES_ABOVE:
            raise UserError(
                f"polar coefficients diverge: iteration {step}, {poly}, maps a singular value of [0, 1] to "
                f"{worst:.4g}, more than {DIVERGES_ABOVE:g}; use a table of pgolf.optim.polar"
            )


def slope(table: Sequence[Coefficients]) -> float:
    """Return the derivative of the scalar map at 0, which is the factor on the smallest singular values."""
    return math.prod(a for a, _, _ in table)


class Quality(NamedTuple):
    """Statistics of the values to which a table maps an interval of singular values."""

    low: float
    """Smallest value."""
    high: float
    """Largest value."""
    rms: float
    """Root mean square deviation from 1; lower is better."""
    mean: float
    """Mean value; a change of it acts like a change of the learning rate."""
    variation: float
    """Standard deviation / mean: the deviation that no learning rate corrects; lower is better."""


def quality(table: Sequence[Coefficients], lower: float = 3e-3, *, points: int = 20_001) -> Quality:
    """Return how close to 1 the scalar map is over log-uniform s in [lower, 1], without rounding.

    Args:
        points: number of values of s.

    Raises:
        ValueError: lower is not in (0, 1).
    """
    if not 0 < lower < 1:
        raise UserError(f"polar quality: lower must be in (0, 1), got {lower}")
    grid = [lower ** (1 - i / (points - 1)) for i in range(points)]
    out = [scalar_map(table, s) for s in grid]
    rms = math.sqrt(sum((v - 1) ** 2 for v in out) / points)
    mean = sum(out) / points
    deviation = math.sqrt(sum((v - mean) ** 2 for v in out) / points)
    return Quality(min(out), max(out), rms, mean, deviation / mean)


def _value(poly: Coefficients, x: float) -> float:
    a, b, c = poly
    return x * (a + x * x * (b + x * x * c))


def _minimax_quintic(low: float, high: float) -> Coefficients:
    """Return the best odd quintic for the constant 1 on [low, high], by the Remez exchange on four points."""
    if low / high > 1 - 5e-6:  # the linear system degenerates; the limit is the Taylor polynomial at high
        return (15 / 8 / high, -10 / 8 / high**3, 3 / 8 / high**5)
    q, r = (3 * low + high) / 4, (low + 3 * high) / 4
    previous = math.inf
    for _ in range(100):
        rows = [[x, x**3, x**5, sign, 1.0] for x, sign in ((low, 1.0), (q, -1.0), (r, 1.0), (high, -1.0))]
        a, b, c, error = _solve(rows)
        if abs(previous - error) <= 1e-15:
            break
        previous = error
        root = math.sqrt(9 * b * b - 20 * a * c)
        q, r = math.sqrt((-3 * b - root) / (10 * c)), math.sqrt((-3 * b + root) / (10 * c))
    return (a, b, c)


def _solve(rows: list[list[float]]) -> list[float]:
    """Return the solution of the augmented linear system, by elimination with partial pivoting."""
    n = len(rows)
    for i in range(n):
        pivot = max(range(i, n), key=lambda k: abs(rows[k][i]))
        rows[i], rows[pivot] = rows[pivot], rows[i]
        for k in range(i + 1, n):
            factor = rows[k][i] / rows[i][i]
            rows[k] = [x - factor * y for x, y in zip(rows[k], rows[i], strict=True)]
    solution = [0.0] * n
    for i in reversed(range(n)):
        rest = sum(rows[i][k] * solution[k] for k in range(i + 1, n))
        solution[i] = (rows[i][n] - rest) / rows[i][i]
    return solution
