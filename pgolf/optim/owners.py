"""Which rank iterates which matrix."""

from __future__ import annotations

import functools


@functools.lru_cache(maxsize=16)
def owners(costs: tuple[int, ...], ranks: int, homes: tuple[tuple[int, ...], ...] = ()) -> tuple[int, ...]:
    """Return the rank that iterates each matrix, so that the ranks' costs are balanced.

    The most expensive matrix comes first, and each goes to the rank with the lowest cost so far. The largest
    cost of a rank is then at most 4/3 of the best possible one (Graham 1969). All ranks get the same result.

    Args:
        costs: of each matrix.
        ranks: number of ranks.
        homes: for each matrix the ranks that hold it whole, if any. It is given to one of them, before all
            matrices without a home, so experts that are sharded by expert do not travel.
    """
    homes = homes or ((),) * len(costs)
    loads, chosen = [0] * ranks, [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: (not homes[i], -costs[i])):
        chosen[i] = min(homes[i] or range(ranks), key=lambda rank: (loads[rank], rank))
        loads[chosen[i]] += costs[i]
    return tuple(chosen)
