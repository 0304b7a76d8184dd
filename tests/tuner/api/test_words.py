"""How errors, settings and events are said to who calls from Python."""

from __future__ import annotations

import logging
import threading

import pytest

from tuner.api.wanted import study_plan
from tuner.api.words import LibraryLog, said, said_for_python
from tuner.errors import TunerError, UsageError
from tuner.worker.signals import signals_into


@pytest.mark.parametrize(
    ("of_command", "of_python"),
    [
        ("--max-failures needs a whole number", "max_failures needs a whole number"),
        (
            "--study NAME starts one, --allow-code-change goes on",
            "name=NAME starts one, allow_code_change=True goes on",
        ),
        ("'tuner extend s --trials +5' adds to it; --trials 3 joins it", None),
    ],
)
def test_options_are_arguments_and_commands_stay(of_command: str, of_python: str | None) -> None:
    of_python = of_python or "'tuner extend s --trials +5' adds to it; trials 3 joins it"
    assert said(of_command) == of_python
    with pytest.raises(TunerError) as caught, said_for_python():
        raise TunerError(of_command)
    assert str(caught.value) == of_python


def test_settings_are_checked_by_their_names() -> None:
    assert study_plan({"trials": 5, "timeout": 90, "pruner": None}).given_settings() == {"trials", "timeout_s"}
    assert study_plan({"timeout": 90}).plan()["budget"].timeout_s == 90
    for settings, message in (
        ({"prunner": "none"}, "no setting 'prunner'; did you mean 'pruner'?"),
        ({"trials": "5"}, "trials: input should be a valid integer, got '5'"),
        ({"precision": "fp8"}, "precision: input should be 'fp32', 'tf32', 'bf16' or 'fp16', got 'fp8'"),
    ):
        with pytest.raises(UsageError) as caught:
            study_plan(settings)
        assert message in str(caught.value)


def test_what_needs_a_look_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "tuner")
    log = LibraryLog(study="s")
    log.event("study", "created study s")
    log.event("slot_died", "slot 0 died; --workers 1 would do")
    log.event("trial_ended", "trial 1 failed", state="FAILED")
    log.event("trial_ended", "trial 2 complete", state="COMPLETE")
    told = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert told == [
        ("INFO", "created study s"),
        ("WARNING", "slot 0 died; workers 1 would do"),
        ("WARNING", "trial 1 failed"),
        ("INFO", "trial 2 complete"),
    ]


def test_a_thread_does_without_signals() -> None:
    ended = []

    def work() -> None:
        with signals_into(None):  # type: ignore[arg-type]  # none comes
            ended.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert ended == [True]
