import datetime as dt
import json
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
    log = Log("json", worker="w1").bind(study="digits")
    log.event("trial_ended", "two\nlines", trial=3, output=Path("/m"))
    log.event("done", "the end")
    out, err = capsys.readouterr()
    first, second = (json.loads(line) for line in err.splitlines())
    assert out == ""
    assert dt.datetime.fromisoformat(first.pop("time")).utcoffset() == dt.timedelta(0)
    assert first == {
        "event": "trial_ended",
        "worker": "w1",
        "study": "digits",
        "trial": 3,
        "output": "/m",
        "message": "two\nlines",
    }
    assert (second["event"], second["study"]) == ("done", "digits")


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_bound_log_writes_as_the_one_it_came_from(log_format):
    log = Log(log_format, worker="w1")
    bound = log.bind(slot=1)
    assert (bound.format, bound.console) == (log.format, log.console)


def test_the_fields_of_a_bound_log_stay_out_of_the_one_it_came_from(capsys):
    log = Log("json", worker="w1")
    log.bind(slot=1, worker="w2").event("ready", "ready")
    log.event("ready", "ready")
    bound, own = (json.loads(line) for line in capsys.readouterr().err.splitlines())
    assert (bound["worker"], bound["slot"], own["worker"]) == ("w2", 1, "w1")
    assert "slot" not in own
