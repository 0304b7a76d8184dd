"""`tuner extend`: a study that goes on beyond what it was created for."""

from __future__ import annotations

import json
import shlex
import sys
from typing import TYPE_CHECKING, Annotated, Final

import typer

from tuner.cli.options import MAX_COUNT, seconds
from tuner.cli.reading import AsJson, StudyName
from tuner.cli.settings import Settings, command
from tuner.errors import UsageError
from tuner.text import duration

if TYPE_CHECKING:
    from storage.coordination.claims import Limit
    from tuner.study.extending import Amount, Extended

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
    found = extend_study(engine, open_study(engine, study), **amounts)
    if as_json:
        before, budget = (its.model_dump(mode="json") for its in (found.before, found.budget))
        reason = None if found.closed is None else found.closed.reason
        print(json.dumps({"study": study, "budget": budget, "before": before, "closed": reason}))
        return
    print(f"study {study}: {_shown(found)}")
    print(_what_next(study, found), file=sys.stderr)


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


def _what_next(study: str, found: Extended) -> str:
    closed = found.closed
    if closed is not None and closed.limit is not None:
        return f"but {closed.reason.partition(';')[0]}; '{more(study, closed.limit)}' lets it go on"
    if closed is not None and (closed.final or closed.paused):
        return f"but {closed.reason.partition(';')[0]}; 'tuner resume {shlex.quote(study)}' lets it go on"
    return f"workers that run take them up; 'tuner worker {shlex.quote(study)}' starts one"


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
