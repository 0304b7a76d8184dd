"""Running the best trials of a study again on fresh seeds, as trials of a companion study that any worker joins."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, Engine

from storage.coordination import control, preflight, records, standings, studies
from storage.coordination.records import TrialRecord
from storage.database.errors import StudyExistsError, StudyNotFoundError
from storage.database.sessions import Sessions
from tuner.errors import TunerError
from tuner.spec import Budget, Confirms, Direction, PrunerSpec, SamplerSpec
from tuner.study.confirmation import Candidate, Confirmation
from tuner.study.joining import AnyStudy, Study, best_of, create_study, find_study, open_study

CONFIRMS = "confirms"
"""The user attribute of a run that has the number of the trial that it repeats."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The trial of a study to make a model of, the confirmed one where there is a `confirmation`.

    `note` is what there is to tell of the choice; None for the search's best of a study that was never confirmed.
    """

    trial: TrialRecord
    confirmation: Confirmation | None = None
    note: str | None = None


def companion_name(study: AnyStudy) -> str:
    """Return what the study of the runs is called."""
    return f"{study.name}/confirm"


def open_confirmable(engine: Engine, name: str) -> Study:
    """Return the study of that name. Raises StudyNotFoundError, and TunerError if its trials cannot be confirmed."""
    best_of(engine, find_study(engine, name))
    study = open_study(engine, name)
    if study.spec.confirms is not None:
        parent = shlex.quote(study.spec.confirms.study)
        raise TunerError(f"study {name!r} is a confirmation itself; 'tuner confirm {parent} --seeds N' adds runs to it")
    return study


def find_companion(engine: Engine, study: AnyStudy) -> Study | None:
    """Return the study that has the runs of this one's trials, None if there is none.

    One that is left of a deleted study of the same name is none: its runs are of other trials.
    """
    try:
        found = find_study(engine, companion_name(study))
    except StudyNotFoundError:
        return None
    if not isinstance(found, Study) or found.spec.confirms is None:
        return None
    return found if found.spec.confirms.created_at == study.created_at else None


def pick(trials: Sequence[TrialRecord], direction: Direction, top: int) -> list[TrialRecord]:
    """Return the `top` best of the complete trials, the best first, each with params that none before it has."""
    sign = 1 if direction == "minimize" else -1
    complete = [
        (sign * trial.value, trial.number, trial)
        for trial in trials
        if trial.state == "COMPLETE" and trial.value is not None and math.isfinite(trial.value)
    ]
    by_params: dict[str, TrialRecord] = {}
    for _, _, trial in sorted(complete, key=lambda one: one[:2]):
        by_params.setdefault(json.dumps(trial.params, sort_keys=True), trial)
    return list(by_params.values())[:top]


def candidates_of(engine: Engine, study: Study, top: int) -> list[TrialRecord]:
    """Return the trials to confirm. Raises TunerError if there is none."""
    found = pick(records.list_trials(engine, study.study_id), study.spec.direction, top)
    if not found:
        raise TunerError(f"study {study.name!r} has no complete trial whose value is a finite number")
    return found


def is_anything_due(engine: Engine, study: Study, trials: Sequence[TrialRecord], seeds: int) -> bool:
    """Whether runs are to be added for each of the trials to have so many, or others are to be done or end."""
    companion = find_companion(engine, study)
    if companion is None:
        return True
    standing, runs = standings.look(Sessions(engine), companion.study_id), _runs(engine, companion)
    is_lacking = any(_lacks(runs.get(trial.number, []), seeds) for trial in trials)
    return is_lacking or standing.waiting + standing.running > 0


def enqueue_runs(engine: Engine, study: Study, trials: Sequence[TrialRecord], seeds: int, code_hash: str) -> Study:
    """Have the companion study run each of the trials on `seeds` seeds, those that it has among them; return it.

    What failed is made up for, but a run that diverged is a result. `code_hash` is of the objective's code here, which
    the search has tried. Raises TunerError if another study has the companion's name.
    """
    companion = find_companion(engine, study) or _create(engine, study, len(trials) * seeds)
    sessions = Sessions(engine)

    def decide(conn: Connection) -> list[control.Queued]:
        runs = _by_trial(records.trials_of(conn, companion.study_id))
        lacks = [_lacks(runs.get(trial.number, []), seeds) for trial in trials]
        return [  # seed by seed: a confirmation that is stopped has as many runs of each
            control.Queued(params=trial.params, user_attrs={CONFIRMS: trial.number})
            for place in range(max(lacks))
            for trial, lack in zip(trials, lacks, strict=True)
            if place < lack
        ]

    preflight.record(sessions, companion.study_id, code_hash, [])
    control.enqueue_all(sessions, companion.study_id, decide)
    return open_study(engine, companion.name)


def confirmation_of(engine: Engine, study: Study) -> Confirmation | None:
    """Return what the study's confirmation has come to so far, None if there is none."""
    companion = find_companion(engine, study)
    if companion is None:
        return None
    best = best_of(engine, study)
    assert best.value is not None
    runs = _runs(engine, companion)
    trials = [records.find_trial(engine, study.study_id, number) for number in sorted(runs)]
    return Confirmation(
        study=study.name,
        name=companion.name,
        direction=study.spec.direction,
        metric=study.spec.metric,
        seed=study.spec.seed,
        candidates=[_candidate(trial, runs[trial.number]) for trial in trials if trial is not None],
        search_best=best.number,
        search_value=best.value,
        n_complete=studies.count_states(engine, study.study_id).complete,
    )


def choose(engine: Engine, study: Study, number: int | None = None) -> Choice:
    """Return the trial to make a model of: that of the `number`, or else the confirmed one, or the search's best.

    Raises TunerError if there is none, or if the study is a confirmation: the best of its runs is one by chance.
    """
    if study.spec.confirms is not None:
        parent = study.spec.confirms.study
        raise TunerError(
            f"study {study.name!r} confirms {parent!r}; 'tuner export {shlex.quote(parent)}' exports what it chose"
        )
    if number is not None:
        return Choice(trial=_complete_trial(engine, study, number), note=f"exporting trial {number}, as --trial says")
    best = best_of(engine, study)
    confirmation = confirmation_of(engine, study)
    if confirmation is None:
        return Choice(trial=best)
    again = f"'tuner confirm {shlex.quote(study.name)}'"
    chosen = confirmation.choice
    if chosen is None:
        why = f"{confirmation.unfinished} of its {confirmation.runs} runs are still to be done"
        why = why if confirmation.unfinished else "none of its runs is complete"
        return Choice(
            trial=best,
            note=f"exporting the best of the search: {confirmation.name} has chosen none, as {why}; {again} goes on",
        )
    note = f"exporting trial {chosen.number}, which {confirmation.name} confirmed"
    if all(its.number != best.number for its in confirmation.candidates):
        note += f"; trial {best.number} has become the best of the search since, and {again} confirms it as well"
    return Choice(trial=_complete_trial(engine, study, chosen.number), confirmation=confirmation, note=note)


def _create(engine: Engine, study: Study, runs: int) -> Study:
    """Create the companion study: the same objective and training, nothing suggested and nothing pruned."""
    assert study.created_at is not None
    spec = study.spec.model_copy(
        update={
            "sampler": SamplerSpec(name="random"),
            "pruner": PrunerSpec(name="none"),
            "audit": 0.0,
            "budget": Budget(trials=runs),
            "history": None,
            "confirms": Confirms(study=study.name, created_at=study.created_at),
        }
    )
    name = companion_name(study)
    try:
        return create_study(engine, name, spec)
    except StudyExistsError as error:
        found = find_companion(engine, study)  # somebody else may have created it just now
        if found is None:
            raise TunerError(
                f"study {name!r} exists, and has no runs of study {study.name!r} as it is now: it is another one's, or"
                f" of one that was deleted; 'tuner delete {shlex.quote(name)}' makes room"
            ) from error
        return found


def _runs(engine: Engine, companion: Study) -> dict[int, list[TrialRecord]]:
    return _by_trial(records.list_trials(engine, companion.study_id))


def _by_trial(trials: Sequence[TrialRecord]) -> dict[int, list[TrialRecord]]:
    """Return the runs by the number of the trial that they repeat."""
    runs: dict[int, list[TrialRecord]] = {}
    for trial in trials:
        number = trial.user_attrs.get(CONFIRMS)
        if isinstance(number, int):
            runs.setdefault(number, []).append(trial)
    return runs


def _lacks(runs: Sequence[TrialRecord], seeds: int) -> int:
    """Return how many runs are to be added."""
    spent = [run for run in runs if run.state != "FAIL" or run.user_attrs.get("failure") == "nan"]
    return max(0, seeds - len(spent))


def _candidate(trial: TrialRecord, runs: Sequence[TrialRecord]) -> Candidate:
    assert trial.value is not None
    failed: dict[str, int] = {}
    values = []
    for run in runs:
        if run.state == "COMPLETE" and run.value is not None and math.isfinite(run.value):
            values.append(run.value)
        elif run.state not in ("RUNNING", "WAITING"):
            kind = "pruned" if run.state == "PRUNED" else str(run.user_attrs.get("failure", "unknown"))
            failed[kind] = failed.get(kind, 0) + 1
    counts = [one.user_attrs.get("parameters") for one in (trial, *runs)]
    return Candidate(
        number=trial.number,
        searched=trial.value,
        params=trial.params,
        parameters=next((count for count in counts if isinstance(count, int)), None),
        values=tuple(values),
        failed=failed,
        unfinished=sum(run.state in ("RUNNING", "WAITING") for run in runs),
    )


def _complete_trial(engine: Engine, study: Study, number: int) -> TrialRecord:
    trial = records.find_trial(engine, study.study_id, number)
    if trial is None or trial.state != "COMPLETE":
        stands = "has no such trial" if trial is None else f"has trial {number} as {trial.state.lower()}"
        raise TunerError(
            f"a model is made of a complete trial, and study {study.name!r} {stands};"
            f" 'tuner trials {shlex.quote(study.name)}' lists them"
        )
    return trial
