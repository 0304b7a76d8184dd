import datetime as dt
import json
import os
import sys
from pathlib import Path

import pytest

from tuner.log import Log


def test_text_is_the_message_for_people_on_stderr(capsys):
    Log(worker="w1").event("trial_ended", "trial 3 complete: [accuracy] 0.97", trial=3)
    assert capsys.readouterr() == ("", "trial 3 complete: [accuracy] 0.97\n")


def test_a_long_line_of_text_is_not_broken(capsys):
    Log().event("exporting", "x" * 500)
    assert capsys.readouterr().err == "x" * 500 + "\n"


def test_json_is_one_object_a_line_with_the_time_the_event_and_every_field(capsys):
    log = Log("json", worker="w1", study="digits")
    log.event("trial_ended", "two\nlines", trial=3, output=Path("/m"))
    log.event("done", "the end")
    out, err = capsys.readouterr()
    first, second = (json.loads(line) for line in err.splitlines())
    assert out == ""
    assert dt.datetime.fromisoformat(first.pop("time")).utcoffset() == dt.timedelta(0)
    assert first == {
        "event": "trial_ended",
        "worker": "w1",
        "slot": None,
        "study": "digits",
        "trial": 3,
        "attempt": None,
        "epoch": None,
        "output": "/m",
        "message": "two\nlines",
    }
    assert (second["event"], second["study"]) == ("done", "digits")


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_log_that_nobody_reads_any_more_says_so_and_ends_nothing(monkeypatch, log_format):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        log = Log(log_format)
        assert not log.is_unread
        log.event("note", "not read")
        assert log.is_unread
        log.event("note", "not read either")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_log_on_a_full_disk_ends_nothing(monkeypatch, log_format):
    with open("/dev/full", "w", buffering=1) as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        log = Log(log_format)
        log.event("note", "not written")
        assert not log.is_unread
        os.dup2(os.open(os.devnull, os.O_WRONLY), stderr.fileno())


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_log_without_stderr_ends_nothing(monkeypatch, log_format):
    monkeypatch.setattr(sys, "stderr", None)
    Log(log_format).event("note", "not written")
