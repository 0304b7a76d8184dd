"""A search in simulated time: workers that ask, report, stop, pause and resume, over trainings that are known."""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import optuna
from optuna.pruners import BasePruner, NopPruner
from optuna.samplers import BaseSampler
from optuna.storages import InMemoryStorage
from optuna.trial import FrozenTrial, TrialState

from benchmarks.search_replay.rules import Gains
from benchmarks.search_replay.tasks import Bounded
from benchmarks.search_replay.world import Training, World
from storage.optuna_storage.rules import NEVER, Rule
from tuner.objective import Objective

CLAIM_S = 0.01
PAUSE_S = 0.1
"""What a pause and a resumption cost each: a checkpoint is written, and read."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """How a search goes on: a sampler, and when trials are stopped, by a rule of ours or by a pruner of Optuna's.

    With `promotes` a trial that is not among the best 1/eta of its rung is paused and not stopped, and goes on once it
    is. `asks_last`: the pruner is asked after a training's last epoch too, as a plain loop of Optuna's does.
    `shows_paused` tells the sampler of paused trials as pruned ones. `doubts` is how many standard deviations of a seed
    a trial is taken to be better than it reported when it is judged, so that what noise may have decided is postponed.
    """

    sampler: Callable[[int], BaseSampler]
    rule: Rule = NEVER
    pruner: Callable[[int], BasePruner] = lambda _: NopPruner()
    asks_last: bool = False
    promotes: Promotion | None = None
    shows_paused: bool = True
    doubts: float = 0.0
    scales: Callable[[int], Rule] | None = None
    """The rule for a training of so many epochs, where it depends on that."""


@dataclass(frozen=True)
class Promotion:
    """Rungs at shares of the epochs; at each the best 1/eta of all that ever came there go on."""

    shares: tuple[float, ...]
    eta: float = 3.0


@dataclass(eq=False)
class _Trial:
    """A trial in the making."""

    trial: optuna.Trial
    training: Training
    done: int = 0
    best: float = math.inf
    test: float = math.inf
    """The test score of the best epoch."""
    values: list[float] = field(default_factory=list)
    bests: list[float] = field(default_factory=list)

    @property
    def number(self) -> int:
        return self.trial.number


class _Storage(InMemoryStorage):
    """Optuna's storage in memory, in which paused trials are seen as pruned."""

    def __init__(self) -> None:
        super().__init__()
        self.paused: dict[int, float] = {}

    def get_all_trials(self, study_id: int, deepcopy: bool = True, states: Any = None) -> list[FrozenTrial]:
        found = super().get_all_trials(study_id, deepcopy=deepcopy)
        if self.paused:
            found = [self._shown(trial) for trial in found]
        return [trial for trial in found if states is None or trial.state in states]

    def _shown(self, trial: FrozenTrial) -> FrozenTrial:
        if trial.number not in self.paused:
            return trial
        return optuna.trial.create_trial(
            state=TrialState.PRUNED,
            value=self.paused[trial.number],
            params=trial.params,
            distributions=trial.distributions,
            intermediate_values=trial.intermediate_values,
        )


@dataclass
class Trace:
    """What the search had at each time its incumbent changed: device seconds, validation and test, to be minimized."""

    at: list[float] = field(default_factory=list)
    value: list[float] = field(default_factory=list)
    test: list[float] = field(default_factory=list)

    def add(self, at: float, value: float, test: float) -> None:
        """Note what one has from now on, if it is better than what there was."""
        if not self.value or value < self.value[-1]:
            self.at.append(at)
            self.value.append(value)
            self.test.append(test)


@dataclass
class Found:
    """What a search found: of all that was reported, and of complete trials, which can be exported."""

    seen: Trace = field(default_factory=Trace)
    complete: Trace = field(default_factory=Trace)
    started: int = 0
    completed: int = 0
    epochs: int = 0


class Simulation:
    """One search on one world; everything that is random follows from `seed`."""

    def __init__(self, world: World, objective: Objective, method: Method, *, workers: int, seed: int) -> None:
        self._world = world
        self._objective = objective
        self._method = method
        self._workers = workers
        epochs = world.task.epochs
        self._epochs = epochs
        self._rule = method.rule if method.scales is None else method.scales(epochs)
        self._storage = _Storage()
        self._study = optuna.create_study(
            storage=self._storage, sampler=method.sampler(seed), pruner=method.pruner(epochs), direction="minimize"
        )
        self._noise = np.random.default_rng(seed)
        self._history = Gains()
        self._rungs = _rungs(method.promotes, epochs)
        self._at_rung: dict[int, list[_Trial]] = {rung: [] for rung in self._rungs}
        self._went_on: dict[int, set[int]] = {rung: set() for rung in self._rungs}
        self.found = Found()

    def run(self, device_s: float) -> Found:
        """Search for so many seconds of device time, all workers' together."""
        events: list[tuple[float, int, int, _Trial | None]] = []
        for worker in range(self._workers):
            heapq.heappush(events, (0.0, worker, worker, None))
        order = self._workers
        until = device_s / self._workers
        while events:
            now, _, worker, trial = heapq.heappop(events)
            if now > until:
                break
            then = self._ended_epoch(trial, now) if trial is not None else None
            if then is None:
                trial, now = self._next(now)
                then = now
            assert trial is not None
            heapq.heappush(events, (then + trial.training.seconds[trial.done], order, worker, trial))
            order += 1
        return self.found

    def _next(self, now: float) -> tuple[_Trial, float]:
        """Return the trial that a free worker takes, and when it begins."""
        if (paused := self._promotable()) is not None:
            self._storage.paused.pop(paused.number, None)
            return paused, now + CLAIM_S + PAUSE_S
        started = time.process_time()  # as the epochs' seconds are: what else runs on the machine must not count
        trial = self._study.ask()
        self._objective.suggest(Bounded(self._world.task, trial))  # type: ignore[arg-type]
        took = time.process_time() - started if self._world.has_params else 0.0
        self.found.started += 1
        training = self._world.training(trial.params, trial.distributions, self._noise)
        return _Trial(trial, training), now + CLAIM_S + took

    def _ended_epoch(self, trial: _Trial, now: float) -> float | None:
        """Return when the trial's next epoch begins; None if the trial ends, or is paused, here."""
        step = trial.done
        trial.done += 1
        self.found.epochs += 1
        value = float(trial.training.value[step])
        if math.isnan(value):
            self._study.tell(trial.trial, state=TrialState.FAIL)
            return None
        trial.values.append(value)
        trial.best = min(trial.best, value)
        trial.bests.append(trial.best)
        trial.trial.report(value, step)
        at, test = now * self._workers, float(trial.training.test[step])
        self.found.seen.add(at, value, test)
        if value == trial.best:
            trial.test = test
        self._history.report(step, trial.best)
        is_last = trial.done == self._epochs
        if (not is_last or self._method.asks_last) and self._is_stopped(trial, step):
            self._study.tell(trial.trial, state=TrialState.PRUNED)
            return None
        if is_last:
            self._history.complete(trial.values)
            self.found.complete.add(at, trial.best, trial.test)
            self.found.completed += 1
            self._study.tell(trial.trial, trial.best)
            return None
        if step in self._at_rung:
            self._at_rung[step].append(trial)
            if not self._is_promotable(trial, step):
                if self._method.shows_paused:
                    self._storage.paused[trial.number] = trial.best
                return None
            self._went_on[step].add(trial.number)
        return now

    def _is_stopped(self, trial: _Trial, step: int) -> bool:
        value = trial.best - self._method.doubts * float(self._world.table.noise[step])
        return self._rule.stops(step, value, self._history) or trial.trial.should_prune()

    def _promotable(self) -> _Trial | None:
        for rung in reversed(self._rungs):
            waiting = [each for each in self._at_rung[rung] if each.number not in self._went_on[rung]]
            best = min(waiting, key=lambda each: (each.bests[rung], each.number), default=None)
            if best is not None and self._is_promotable(best, rung):
                self._went_on[rung].add(best.number)
                return best
        return None

    def _is_promotable(self, trial: _Trial, rung: int) -> bool:
        assert self._method.promotes is not None
        there = self._at_rung[rung]
        n_better = sum(other.bests[rung] < trial.bests[rung] for other in there)
        return n_better < math.floor(len(there) / self._method.promotes.eta)


def _rungs(promotion: Promotion | None, epochs: int) -> list[int]:
    if promotion is None:
        return []
    return sorted({min(max(round(share * epochs), 1), epochs - 1) - 1 for share in promotion.shares})
