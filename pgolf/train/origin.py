"""Where on its schedules and in its text a run begins: plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from pgolf.errors import UserError


@dataclass(frozen=True)
class Origin:
    """Where the state comes from that a run continues; without a snapshot the beginning of everything.

    The fraction is exact. So a run that continues another one at its own pace gets, step by step, the same
    floating-point fractions as the other one would have had.
    """

    steps: int = 0
    """Steps that were done before, in all runs."""
    tokens: int = 0
    """Tokens of the training text before the run's first one."""
    frac: Fraction = Fraction(0)
    """Fraction of the schedules at which the run begins."""
    last: float | None = None
    """Fraction at which the last step before began; None: there was none."""
    taken: int = 0
    """Snapshots in the average, with optim.average=swa."""
    snapshot: str = ""
    """Path of the snapshot; empty: the run begins a training."""

    def at(self, share: float | Fraction, until: float) -> Fraction:
        """Return the fraction of the schedules when `share` (0 to 1) of the run is done.

        It is frac + (until - frac) * share, exact.
        """
        # By its decimals: 0.15 is then 3/20, which 6 of 40 steps are, too.
        return self.frac + (Fraction(str(until)) - self.frac) * Fraction(share)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON data; empty for a run that begins a training."""
        if not self.snapshot:
            return {}
        return {**vars(self), "frac": [self.frac.numerator, self.frac.denominator]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Origin:
        """Return the origin that `to_dict` gave.

        Raises:
            UserError: a field is missing or not what was written.
        """
        if not data:
            return cls()
        try:
            numerator, denominator = map(int, data["frac"])
            last = None if data["last"] is None else float(data["last"])
            found = cls(
                steps=int(data["steps"]),
                tokens=int(data["tokens"]),
                frac=Fraction(numerator, denominator),
                last=last,
                taken=int(data["taken"]),
                snapshot=str(data["snapshot"]),
            )
            if not (0 <= found.frac <= 1 and min(found.steps, found.tokens, found.taken) >= 0):
                raise UserError(f"frac is {found.frac}, steps {found.steps}, tokens {found.tokens}")
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as e:
            raise UserError(f"it does not say where training was: {type(e).__name__} {e}") from e
        return found
