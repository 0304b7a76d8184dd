"""`tuner extend` and `adopt`: studies that go on beyond what they were created for."""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING, Annotated, Final

import typer

from tuner.cli.options import BUDGET, MAX_COUNT, ObjectiveName, SpecOptions, seconds
from tuner.cli.reading import AsJson, StudyName
from tuner.cli.settings import Settings, command
from tuner.cli.streams import say
from tuner.errors import UsageError
from tuner.text import duration

if TYPE_CHECKING:
    from storage.coordination.standings import Limit
    from tuner.study.extending import Amount, Extended
    from tuner.study.joining import Study

_MORE: Final[dict[Limit, str]] = {
    "trials": "--trials +20",
    "max_failures": "--max-failures +10",
    "timeout": "--timeout +1h",
}


@command
def extend(
    settings: Settings,
    study: StudyName,
    trials: Annotated[str | None, typer.Option(metavar="+N", help="Trials to add.")] = None,
    timeout: Annotated[
        str | None, typer.Option(metavar="+TIME", help="Time to add; if it has run out, from now on: +90s, +15m, +2h.")
    ] = None,
    max_failures: Annotated[
        str | None, typer.Option(metavar="+N", help="Failed trials to add to those that do not end the study.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Add to the budget of STUDY, finished or not. Workers that run take it up by themselves.

    Without a +, what is given is the new limit, which cannot be less than
    the old one.
    """
    from tuner.study.extending import extend_study
    from tuner.study.joining import open_study

    amounts = {
        "trials": _count("--trials", trials),
        "timeout": _time("--timeout", timeout),
        "max_failures": _count("--max-failures", max_failures),
    }
    if all(amount is None for amount in amounts.values()):
        raise UsageError("extend needs --trials, --timeout or --max-failures, such as --trials +20")
    engine = settings.open()
    opened = open_study(engine, study)
    found = extend_study(engine, opened, **amounts)
    if as_json:
        before, budget = (its.model_dump(mode="json") for its in (found.before, found.budget))
        reason = None if found.closed is None else found.closed.reason
        print(json.dumps({"study": study, "budget": budget, "before": before, "closed": reason}))
        return
    say(f"study {study}: {_shown(found)}")
    say(_what_next(opened, found), err=True)


@command
def adopt(
    settings: Settings,
    study: StudyName,
    objective: ObjectiveName,
    options: SpecOptions,
    trials: Annotated[
        str,
        typer.Option(
            metavar="[+]N",
            help="Trials to add to those that are done, or without a + to have in all.",
            rich_help_panel=BUDGET,
        ),
    ] = "+30",
    as_json: Annotated[bool, typer.Option("--json", help="Print the study as JSON.")] = False,
) -> None:
    """Let workers go on with STUDY, which another Optuna program made or tuner import copied, by OBJECTIVE.

    Its trials stay, count towards the budget, and are what the sampler
    learns from.
    """
    from tuner.study.adopting import adopt_study, check_adoptable
    from tuner.study.joining import find_study, plan
    from tuner.study.registry import find_objective, is_objective_class

    amount = _count("--trials", trials)
    assert amount is not None
    wanted = options.plan()
    engine = settings.open()
    found = find_study(engine, study)
    check_adoptable(found)
    source = find_objective(objective)
    kind = source.load()
    if wanted["direction"] is None and not is_objective_class(kind):
        wanted["direction"] = found.directions[0]
    spec, model_class = plan(source, kind, **wanted)
    adopted = adopt_study(engine, found, spec, model_class, amount)
    for note in adopted.notes:
        say(note, err=True)
    budget, standing = adopted.study.spec.budget, adopted.standing
    if as_json:
        spec_fields = adopted.study.spec.model_dump(mode="json")
        print(json.dumps({"study": study, "done": standing.done, "notes": adopted.notes, "spec": spec_fields}))
        return
    say(
        f"study {study} has objective {source.name}: {standing.done} of {budget.trials} trials are done;"
        f" '{adopted.study.worker_command}' goes on"
    )


def more(study: str, limit: Limit) -> str:
    """Return the command that adds to what of the study's budget is used up."""
    return f"tuner extend {shlex.quote(study)} {_MORE[limit]}"


def _shown(found: Extended) -> str:
    before, now = found.before, found.budget
    parts = [f"{now.trials} trials" + ("" if now.trials == before.trials else f" ({before.trials} before)")]
    if now.timeout_s is not None and before.timeout_s is not None:
        was = "" if now.timeout_s == before.timeout_s else f" ({duration(before.timeout_s)} before)"
        parts.append(f"{duration(now.timeout_s)} from its creation{was}")
    if now.max_failures != before.max_failures:
        parts.append(f"{now.max_failures} failures allowed ({before.max_failures} before)")
    return ", ".join(parts)


def _what_next(study: Study, found: Extended) -> str:
    closed = found.closed
    if closed is not None and closed.limit is not None:
        return f"but {closed.reason}; '{more(study.name, closed.limit)}' lets it go on"
    if closed is not None and (closed.final or closed.paused):
        return f"but {closed.reason.partition(';')[0]}; 'tuner resume {shlex.quote(study.name)}' lets it go on"
    return f"workers that run take them up; '{study.worker_command}' starts one"


def _count(option: str, text: str | None) -> Amount | None:
    from tuner.study.extending import Amount

    if text is None:
        return None
    digits = text.removeprefix("+")
    if not (digits.isascii() and digits.isdigit() and 0 < int(digits[:11]) <= MAX_COUNT):
        raise UsageError(f"{option} needs a whole number above 0, with a + what is to be added: +20; got {text!r}")
    return Amount(value=int(digits), is_more=text.startswith("+"))


def _time(option: str, text: str | None) -> Amount | None:
    from tuner.study.extending import Amount

    if text is None:
        return None
    return Amount(value=seconds(option, text.removeprefix("+")), is_more=text.startswith("+"))
