"""Giving a study that another program made a spec, so that workers go on with it: its trials stay what they are."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from optuna.distributions import BaseDistribution, check_distribution_compatibility
from sqlalchemy import Engine

from storage.coordination import control, studies
from storage.coordination.standings import Standing
from storage.database.errors import StudyExistsError
from storage.database.sessions import Sessions
from storage.trials.creation import distributions_of, param_names
from tuner.errors import TunerError, UsageError
from tuner.spec import Spec
from tuner.study.extending import Amount
from tuner.study.joining import AnyStudy, Study, open_study
from tuner.study.params import range_text

if TYPE_CHECKING:
    from tuner.objective import Objective


@dataclass(frozen=True, kw_only=True)
class Adopted:
    """A study that has got a spec, how it stood then, and what there is to tell of its trials, line by line."""

    study: Study
    standing: Standing
    notes: list[str]


def check_adoptable(study: AnyStudy) -> None:
    """Raise TunerError if the study has a spec already, or more objectives than one."""
    if study.spec is not None:
        _refuse_second(study.name)
    if len(study.directions) > 1:
        raise TunerError(
            f"study {study.name!r} has {len(study.directions)} objectives ({study.goal}), and workers search for one"
        )


def adopt_study(engine: Engine, study: AnyStudy, spec: Spec, objective: Objective | None, trials: Amount) -> Adopted:
    """Give the study this spec; `objective` is None for a plain function, of whose params nothing is known yet.

    The trials that are there are history: `trials` more than those that are done are to be done, or so many with
    them; failed ones do not count towards `max_failures`. Raises UsageError, and changes nothing, where the spec and
    the trials do not go together.
    """
    check_adoptable(study)
    direction, metric = study.directions[0], study.metrics[0]
    if spec.direction != direction:
        raise UsageError(
            f"study {study.name!r} {direction}s {metric}, and {spec.objective.name} is to {spec.direction}"
            f" {spec.metric}: nothing of its trials would be right"
        )
    if spec.sampler.name == "grid":
        raise UsageError(
            "--sampler grid searches all of a space, whatever trials there are; 'tuner create' makes a study of it"
        )
    notes = [] if objective is None else _compared(engine, study, objective)
    if objective is None:  # what its trials were called stays
        spec = spec.model_copy(update={"metric": metric})
    elif metric not in (spec.metric, "value"):
        notes.append(f"what its trials have as {metric} is {spec.metric} from now on")
    attrs = {"objective": spec.objective.name, "metric": spec.metric, "epochs": spec.epochs, "seed": spec.seed}

    def decide(standing: Standing) -> dict[str, Any]:
        return _counted(study.name, spec, standing, trials).model_dump(mode="json")

    sessions = Sessions(engine)
    try:
        standing = control.adopt(sessions, study.study_id, decide, attrs, spec.metric)
    except StudyExistsError:
        _refuse_second(study.name)
    if running := studies.numbers_in(sessions, study.study_id, "RUNNING"):
        numbers = ", ".join(map(str, running[:10])) + (", ..." if len(running) > 10 else "")
        notes.append(
            f"another program runs trial {numbers}, within the budget; if it is gone, 'tuner release"
            f" {shlex.quote(study.name)} {running[0]}' lets a worker run it"
        )
    return Adopted(study=open_study(engine, study.name), standing=standing, notes=notes)


def _refuse_second(name: str) -> NoReturn:
    raise TunerError(
        f"study {name!r} has a spec already, and workers may run its trials: 'tuner extend {shlex.quote(name)}"
        " --trials +20' adds to them"
    )


def _counted(name: str, spec: Spec, standing: Standing, trials: Amount) -> Spec:
    """Return the spec with a budget that counts the trials there are. Raises UsageError."""
    wanted = int(trials.value) + (standing.done if trials.is_more else 0)
    if wanted <= standing.done:
        raise UsageError(
            f"--trials: {standing.done} trials of study {name!r} are done, which count; a + adds to them:"
            f" --trials +{wanted}"
        )
    budget = {"trials": wanted, "max_failures": spec.budget.max_failures + standing.failures}
    return spec.model_copy(update={"budget": spec.budget.model_copy(update=budget)})


def _compared(engine: Engine, study: AnyStudy, objective: Objective) -> list[str]:
    """Return what to tell of the params of the objective and of the trials.

    Raises UsageError for params that a study cannot have beside those of its trials.
    """
    from tuner.study.sampling import discover

    sessions = Sessions(engine)
    names = param_names(sessions, study.study_id)
    theirs, ours = distributions_of(sessions, study.study_id, names), discover(objective)
    both = [name for name in ours if name in theirs]
    wrong = [name for name in both if not _is_compatible(theirs[name], ours[name])]
    kind = type(objective).__name__
    if wrong:
        told = "; ".join(f"{name} is {_shown(theirs[name])} in its trials, {_shown(ours[name])} here" for name in wrong)
        raise UsageError(
            f"study {study.name!r} cannot go on with {kind}: {told}. Give these params other names in {kind}, or start"
            f" a study that learns from what agrees: 'tuner run ... --from {shlex.quote(study.name)}'"
        )
    notes = [
        f"{name}: {range_text(theirs[name])} in its trials, {range_text(ours[name])} from now on"
        for name in both
        if theirs[name] != ours[name]
    ]
    for told, found in (
        ("no longer suggested", [name for name in theirs if name not in ours]),
        ("new, and in none of its trials", [name for name in ours if name not in theirs]),
    ):
        if found and names:
            notes.append(f"{told}: {', '.join(found)}")
    return notes


def _is_compatible(there: BaseDistribution, here: BaseDistribution) -> bool:
    try:
        check_distribution_compatibility(there, here)  # what suggesting it would do
    except ValueError:
        return False
    return True


def _shown(distribution: BaseDistribution) -> str:
    kind = type(distribution).__name__.removesuffix("Distribution").lower()
    return f"{range_text(distribution)} ({kind})"
