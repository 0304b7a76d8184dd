"""What a study's rows hold moves no cursor, colours nothing and forges no line, whichever command shows it."""

from __future__ import annotations

import re

import optuna
import pytest
from command import Tuner
from optuna.trial import TrialState, create_trial

from storage import open_storage

pytestmark = pytest.mark.slow

EVIL = "\x1b[2J\x1b]0;owned\x07\r\x9b31m\u202e\u2028"
NAME = f"s{EVIL}"
CONTROL = re.compile(r"[^\n\x20-\x7e\u00a0-\u024f\u2014\u2500-\u257f\u2026]")


@pytest.fixture
def hostile(tuner: Tuner, database: str) -> Tuner:
    """The command line beside a study whose every text is hostile."""
    assert tuner("create", "digits", "--study", NAME, "--trials", "9").code == 0
    storage = open_storage(database)
    study = optuna.load_study(study_name=NAME, storage=storage)
    study.set_user_attr(f"a{EVIL}", EVIL)
    kind = optuna.distributions.CategoricalDistribution([f"x{EVIL}", "y"])
    attrs = {f"note{EVIL}": EVIL, "failure": f"user{EVIL}", "failure_message": f"broken{EVIL}", "device": EVIL}
    for state, value in ((TrialState.COMPLETE, 0.5), (TrialState.FAIL, None), (TrialState.WAITING, None)):
        study.add_trial(
            create_trial(
                state=state,
                value=value,
                params={f"p{EVIL}": f"x{EVIL}"},
                distributions={f"p{EVIL}": kind},
                user_attrs=attrs,
                intermediate_values={0: 0.5},
            )
        )
    storage.engine.dispose()
    return tuner


def test_no_command_prints_what_a_terminal_would_obey(hostile: Tuner) -> None:
    commands = [
        ["studies"],
        *([name, NAME] for name in ("status", "trials", "show", "best", "pause", "resume", "stop", "export", "delete")),
        ["compare", NAME, NAME],
        *(["trials", NAME, "--number", number, *more] for number in "07" for more in ([], ["--curve"])),
        ["enqueue", NAME, f"q{EVIL}=1"],
        ["enqueue", NAME, f"p{EVIL}=y{EVIL}"],
        *(
            [name, NAME, number]
            for name, number in (("cancel", "0"), ("cancel", "2"), ("release", "1"), ("release", "7"))
        ),
        ["extend", NAME, "--trials", "+1"],
        ["extend", NAME, "--timeout", "+1h"],
        ["create", "digits", "--study", NAME, "--trials", "3"],
        ["adopt", NAME, "digits"],
        ["run", "digits", "--study", NAME, "--seed", "7"],
        ["worker", NAME, "--objective", f"nothing{EVIL}.py:X"],
        ["status", f"no{EVIL}"],
        ["delete", NAME, "--yes"],
    ]
    for command in commands:
        done = hostile(*command)
        for text in (done.stdout, done.stderr):
            found = CONTROL.search(text)
            assert found is None, (command[0], command[2:], text[max(0, found.start() - 60) : found.end() + 20])
        assert "Traceback" not in done.stderr
