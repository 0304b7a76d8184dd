"""Exit codes: by signal and by error, as the table of the documentation has them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from storage.database.errors import InvalidURLError, NotLetInError, NotReadyError, StudyNotFoundError
from tuner import exits
from tuner.errors import AskedToStop, StudyFailedError, TunerError, UsageError
from tuner.exits import OF_SIGNAL, ExitCode, exit_code, signals_as_requests

PAGE = Path(__file__).parents[2] / "docs/command-line.md"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (TunerError("x"), 1),
        (StudyNotFoundError("x"), 1),
        (OSError("x"), 1),
        (UsageError("x"), 2),
        (InvalidURLError("x"), 2),
        (NotReadyError("x"), 3),
        (NotLetInError("x"), 4),
        (StudyFailedError("x"), 5),
        (TunerError("of a slot that was not let in", 4), 4),
    ],
)
def test_each_error_has_its_code(error: Exception, code: int) -> None:
    assert exit_code(error) == code


@pytest.mark.parametrize("number", sorted(set(OF_SIGNAL) - {signal.SIGINT}))
def test_a_signal_is_a_request_and_one_that_comes_with_it_the_same(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exits, "TOGETHER_S", 600.0)
    before = signal.getsignal(number)
    with pytest.raises(AskedToStop) as asked:
        get_twice(number)
    wanted = 75 if number in (signal.SIGUSR1, signal.SIGUSR2) else 128 + number
    assert asked.value.exit_code == wanted
    assert signal.getsignal(number) == before


def get_twice(number: signal.Signals) -> None:
    with signals_as_requests():
        try:
            os.kill(os.getpid(), number)
        finally:
            os.kill(os.getpid(), number)


FORKS = """
import os, signal
from tuner.exits import signals_as_requests

with signals_as_requests():
    ready, tell = os.pipe()
    child = os.fork()
    if not child:
        os.write(tell, b"x")
        signal.pause()  # the parent's handler would raise here, and the child go on as a second one of it
        os._exit(0)
    os.read(ready, 1)
    os.kill(child, signal.SIGUSR1)
    print(os.WTERMSIG(os.waitpid(child, 0)[1]))
"""


def test_a_child_that_is_forked_is_ended_by_what_asks_its_parent() -> None:
    done = subprocess.run([sys.executable, "-c", FORKS], capture_output=True, text=True, check=True)
    assert int(done.stdout) == signal.SIGUSR1


def test_what_is_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals_as_requests():
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_table_has_every_code() -> None:
    section = PAGE.read_text().partition("## Exit codes")[2].partition("\n## ")[0]
    listed = [int(code) for row in re.findall(r"^\| ([\d, ]+) \|", section, re.M) for code in row.split(", ")]
    assert listed == sorted(ExitCode)
