"""What a worker knows of one of its slots."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

from storage.coordination import claims
from storage.coordination.workers import SlotState
from tuner.worker.breaker import Breaker
from tuner.worker.slot_process import SlotProcess
from tuner.worker.slots import SlotPlan


@dataclass(kw_only=True)
class KnownSlot:
    """A slot as the worker knows it.

    `may_claim` from when it was told to claim a trial until it has none any more; `wants` while it waits to be told;
    `has_nothing` from when it found no trial to claim until it has one;
    `waits_alone` while it holds a trial that ran out of memory, and nothing on its device.
    """

    plan: SlotPlan
    process: SlotProcess
    device: str
    state: SlotState = "starting"
    held: claims.Claim | None = None
    epoch: int | None = None
    wants: bool = False
    may_claim: bool = False
    has_nothing: bool = False
    waits_alone: bool = False
    was_ready: bool = False
    deaths: int = 0
    breaker: Breaker = field(default_factory=Breaker)
    failed_by: str | None = None
    last_trial: int | None = None
    prints_for: int | None = None
    is_paused: bool = False
    since: float = field(default_factory=time.monotonic)
    told_at: float = -math.inf
    restart_at: float | None = None

    def let_go(self, state: SlotState) -> None:
        """Have no trial any more."""
        self.held, self.epoch, self.may_claim, self.waits_alone = None, None, False, False
        self.state = state
