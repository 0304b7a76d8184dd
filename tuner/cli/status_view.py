"""A study's status as `tuner status` shows it: lines for people, JSON for programs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from tuner.api.reading import best_fields_of
from tuner.cli.reading import print_json
from tuner.cli.streams import say
from tuner.placement import Placement
from tuner.text import duration, number_text, params_text, printable, table

if TYPE_CHECKING:
    from storage.coordination.workers import RunningTrial, SlotNow, WorkerNow
    from tuner.study.audits import Audits
    from tuner.study.replay import Replayed
    from tuner.study.status import Status

HIDE_LOST_S = 3600.0
"""For how long a lost worker is shown."""


def show(found: Status, *, as_json: bool) -> None:
    """Print it."""
    if as_json:
        print_json(fields(found))
    else:
        for line in lines(found):
            say(line)


def fields(found: Status) -> dict[str, Any]:
    """Return it as `tuner status --json` prints it; docs/status.md tells what each field is."""
    study = found.study
    return {
        "study": study.name,
        "at": found.at.isoformat(timespec="milliseconds"),
        "state": found.state,
        "reason": found.reason,
        "objective": None if study.spec is None else study.spec.objective.name,
        "metric": ", ".join(study.metrics),
        "direction": ", ".join(study.directions),
        "budget": None if study.spec is None else study.spec.budget.model_dump(mode="json"),
        "trials": asdict(found.counts),
        "lost": found.lost,
        "trials_per_hour": found.pace.per_hour,
        "left_s": found.left_s,
        "best": None if found.best is None else best_fields_of(study, found.best),
        "failures": found.failures,
        "device_seconds": asdict(found.cost),
        "workers": [_worker_fields(worker) for worker in found.workers],
        "workers_live": sum(not worker.is_lost for worker in found.workers),
        "workers_lost": sum(worker.is_lost for worker in found.workers),
        "workers_ended": found.ended_workers,
        "audited": None if found.audits is None else asdict(found.audits),
        "replay": _replay_fields(_other_pruner(found)),
        "last_seen": None if found.last_seen is None else found.last_seen.isoformat(timespec="milliseconds"),
    }


def lines(found: Status) -> Iterator[str]:
    """Yield it as lines for people."""
    for name, text in _rows(found):
        yield f"{name:<10}{printable(text)}"
    yield from _worker_table(found)


def _rows(found: Status) -> Iterator[tuple[str, str]]:
    study, best = found.study, found.best
    yield "study", f"{study.name}: {'not of tuner' if study.spec is None else study.spec.objective.name}, {study.goal}"
    yield "state", found.state if found.reason is None else f"{found.state}: {found.reason}"
    yield "trials", _counts_text(found)
    rate = found.pace.per_hour
    if rate and found.state != "finished":
        left = "" if found.left_s is None else f", about {duration(found.left_s)} left"
        yield "pace", f"{rate:.{0 if rate >= 100 else 1}f} trials an hour{left}"
    if len(study.directions) > 1:
        yield "best", f"no single one with {len(study.directions)} objectives"
    elif best is None:
        yield "best", "none yet"
    else:
        yield "best", f"{number_text(best.value)} (trial {best.number})"
        yield "params", params_text(best.params)
    for kind, (count, message) in found.failures.items():
        yield "failures", f"{count} {kind}: {message}"
    spent = {kind: seconds for kind, seconds in asdict(found.cost).items() if round(seconds)}
    if spent:
        kinds = ", ".join(f"{duration(seconds)} {kind}" for kind, seconds in spent.items())
        yield "cost", f"{duration(sum(spent.values()))} of devices' time: {kinds}"
    if found.audits is not None:
        yield "audit", _audits_text(found.audits)
    if (other := _other_pruner(found)) is not None:
        yield (
            "replay",
            f"--pruner {other.rule} would have saved {other.saved.mean:.0%} of the epochs of its complete trials,"
            f" and kept the best in {other.best_kept:.0%} of orders; 'tuner replay' tells more",
        )
    if found.workers or study.spec is not None:
        yield "workers", _workers_text(found)
    for versions in _versions(found.workers):
        yield "versions", versions


def _audits_text(its: Audits) -> str:
    ran_on = f"{its.audited} trials that were to be pruned ran on"
    if its.above_median is None or its.top_tenth is None or its.best is None:
        return f"{ran_on}; nothing to compare yet"
    judged = (
        ("better than the median", its.above_median),
        ("in the top tenth", its.top_tenth),
        ("the best", its.best),
    )
    shown = ", ".join(f"{one.count} {what} ({one.low:.0%} to {one.high:.0%})" for what, one in judged)
    return f"{ran_on}, {duration(its.seconds)}: {shown}"


def _other_pruner(found: Status) -> Replayed | None:
    """Return what `rungs` would have done to the complete trials; `median`, where the study was pruned by rungs."""
    if found.replay is None:
        return None
    own = None if found.study.spec is None else found.study.spec.pruner.name
    return next(its for its in found.replay.rules if its.rule == ("median" if own == "rungs" else "rungs"))


def _replay_fields(its: Replayed | None) -> dict[str, Any] | None:
    return None if its is None else {"pruner": its.rule, "saved": its.saved.mean, "best_kept": its.best_kept}


def _counts_text(found: Status) -> str:
    counts, spec = found.counts, found.study.spec
    again = f" ({found.lost} of them lost their worker and will run again)" if found.lost else ""
    of_budget = "" if spec is None else f"/{spec.budget.trials}"
    return (
        f"{counts.done}{of_budget} done ({counts.complete} complete, {counts.pruned} pruned),"
        f" {counts.running} running{again}, {counts.waiting} waiting, {counts.failed} failed"
    )


def _workers_text(found: Status) -> str:
    lost = [worker for worker in found.workers if worker.is_lost]
    hidden = sum(not _is_shown(worker) for worker in lost)
    parts = [
        str(len(found.workers) - len(lost) or "none"),
        f"{len(lost) - hidden} lost" if len(lost) > hidden else "",
        f"{hidden} lost more than {duration(HIDE_LOST_S)} ago" if hidden else "",
        f"{found.ended_workers} ended" if found.ended_workers else "",
    ]
    return ", ".join(filter(None, parts))


def _worker_table(found: Status) -> Iterator[str]:
    shown = [worker for worker in found.workers if _is_shown(worker)]
    rows = [[*_slot_row(worker, slot), _placed_text(worker)] for worker in shown for slot in worker.slots]
    names = ["worker", "slot", "device", "state", "trial", "epoch", "value", "last seen", "placed by"]
    if all(worker.placement is None for worker in shown):
        names, rows = names[:-1], [row[:-1] for row in rows]
    if rows:
        yield from (f"  {line}" for line in table(names, rows))


def _is_shown(worker: WorkerNow) -> bool:
    return not worker.is_lost or worker.silent_s < HIDE_LOST_S


def _slot_row(worker: WorkerNow, slot: SlotNow) -> list[Any]:
    trial = slot.trial
    part = f" x{slot.share:.2g}" if slot.share != 1 else ""
    return [
        worker.name,
        slot.slot,
        f"{slot.device}{part}",
        "lost" if worker.is_lost else _slot_state(slot),
        "-" if trial is None else trial.number,
        "-" if trial is None or trial.step is None else trial.step,
        number_text(None if trial is None else trial.value),
        f"silent for {duration(worker.silent_s)}" if worker.is_lost else f"{duration(worker.silent_s)} ago",
    ]


def _placed_text(worker: WorkerNow) -> str:
    """Return who placed the worker, and what that says of it where it was asked."""
    if worker.placement is None:
        return "-"
    state = worker.placement.get("state")
    return Placement.of_fields(worker.placement).shown + ("" if state is None else f": {state}")


def _slot_state(slot: SlotNow) -> str:
    """Return the slot's state; its worker may not have told yet that it has a trial."""
    return "running" if slot.trial is not None else slot.state


def _versions(workers: list[WorkerNow]) -> Iterator[str]:
    """Yield the versions of the workers that are there, and who has which where they differ."""
    names: dict[str, list[str]] = {}
    for worker in workers:
        if not worker.is_lost and worker.versions:
            text = ", ".join(f"{package} {version}" for package, version in worker.versions.items())
            names.setdefault(text, []).append(worker.name)
    for text, whose in names.items():
        yield text if len(names) == 1 else f"{text} ({', '.join(whose)})"


def _worker_fields(worker: WorkerNow) -> dict[str, Any]:
    return {
        "worker": worker.name,
        "lost": worker.is_lost,
        "started_at": worker.started_at.isoformat(timespec="milliseconds"),
        "last_seen": worker.last_seen.isoformat(timespec="milliseconds"),
        "silent_s": worker.silent_s,
        "versions": worker.versions,
        "placed_by": _placement_fields(worker.placement),
        "slots": [
            {
                "slot": slot.slot,
                "device": slot.device,
                "share": slot.share,
                "state": _slot_state(slot),
                "trial": None if slot.trial is None else _trial_fields(slot.trial),
            }
            for slot in worker.slots
        ],
    }


def _placement_fields(placement: Mapping[str, str | None] | None) -> dict[str, str | None] | None:
    if placement is None:
        return None
    return {**Placement.of_fields(placement).fields(), "state": placement.get("state")}


def _trial_fields(trial: RunningTrial) -> dict[str, Any]:
    return {
        "number": trial.number,
        "attempt": trial.attempt,
        "started_at": trial.started_at.isoformat(timespec="milliseconds"),
        "epoch": trial.step,
        "value": trial.value,
    }
