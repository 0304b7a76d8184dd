"""`tuner replay`: what pruners would have done to a study's complete trials."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from tuner.cli.reading import AsJson, StudyName, print_json
from tuner.cli.settings import Settings, command
from tuner.cli.streams import say
from tuner.errors import TunerError
from tuner.text import table

if TYPE_CHECKING:
    from tuner.study.replay import Interval

MAX_STOPPED = 5
"""Of the best trials that a rule would have stopped, so many are named."""


@command
def replay(settings: Settings, study: StudyName, as_json: AsJson = False) -> None:
    """Tell what each pruner would have saved of STUDY's complete trials, and which good ones it would have stopped."""
    from tuner.study import replay
    from tuner.study.joining import find_study

    engine = settings.open()
    opened = find_study(engine, study)
    found = replay.replay(engine, opened)
    if found is None:
        raise TunerError(
            f"study {study!r} has fewer than {replay.MIN_TRIALS} complete trials that reported their epochs: too few to"
            " replay; a study with --pruner none completes all of its trials"
        )
    if as_json:
        print_json({"study": opened.name, **asdict(found)})
        return
    of_all = "" if found.replayed == found.complete else f" of {found.complete}"
    say(
        f"{opened.name}: {found.replayed}{of_all} complete trials of up to {found.epochs} epochs,"
        f" one after the other in {replay.ORDERS} random orders"
    )
    rows = []
    for its in found.rules:
        named = [f"{number} ({share:.0%})" for number, share in list(its.often.items())[:MAX_STOPPED]]
        more = f", {len(its.often) - MAX_STOPPED} more" if len(its.often) > MAX_STOPPED else ""
        rows.append(
            [its.rule, _shown(its.saved), _shown(its.stopped), f"{its.best_kept:.0%}", ", ".join(named) + more or "-"]
        )
    names = ["pruner", "epochs saved", f"of the best {found.top} stopped", "best kept", "trials stopped of the best"]
    for line in table(names, rows):
        say(line)


def _shown(interval: Interval) -> str:
    return f"{interval.mean:.0%} ({interval.low:.0%} to {interval.high:.0%})"
