"""What a manifest says of the confirmation that its trial was chosen by."""

from __future__ import annotations

from tuner.model.manifest import Confirmed
from tuner.study.confirmation import Confirmation


def confirmed_by(confirmation: Confirmation | None) -> Confirmed | None:
    """Return what it has chosen as a manifest holds it, None without one."""
    choice = None if confirmation is None else confirmation.choice
    if confirmation is None or choice is None or choice.mean is None:
        return None
    gap = next(iter(confirmation.gaps.values()), None)
    return Confirmed(
        study=confirmation.name,
        runs=len(choice.values),
        mean=choice.mean,
        std=choice.std,
        alike=[its.number for its in confirmation.alike[1:]],
        gap=None if gap is None else gap.value,
        gap_interval=None if gap is None else (gap.low, gap.high),
    )
