import io
import json

import pytest
from rich.console import Console

from storage.coordination.records import TrialRecord
from storage.coordination.studies import StateCounts
from tuner.log import Log
from tuner.worker.progress import Progress, Snapshot


def a_snapshot(*, complete=0, pruned=0, running=0, failed=0, best=None, left_s=None):
    record = None
    if best is not None:
        record = TrialRecord(trial_id=9, number=4, state="COMPLETE", value=best, started_at=None, ended_at=None)
    counts = StateCounts(complete=complete, pruned=pruned, running=running, failed=failed)
    return Snapshot(counts=counts, trials=30, best=record, left_s=left_s)


@pytest.mark.parametrize(
    ("snapshot", "text"),
    [
        (a_snapshot(), "0/30 done, 0 running, 0 pruned, 0 failed"),
        (a_snapshot(complete=3, pruned=2, running=2, failed=1), "5/30 done, 2 running, 2 pruned, 1 failed"),
        (
            a_snapshot(complete=1, best=0.97222222, left_s=75),
            "1/30 done, 0 running, 0 pruned, 0 failed, best 0.972222 (trial 4), about 1:15 left",
        ),
        (a_snapshot(best=0.0), "0/30 done, 0 running, 0 pruned, 0 failed, best 0 (trial 4)"),
    ],
)
def test_a_snapshot_says_all_in_one_line(snapshot, text):
    assert snapshot.text() == text


def test_off_a_terminal_the_first_and_the_last_snapshot_are_lines_and_those_soon_after_are_not(capsys):
    with Progress(Log()) as progress:
        progress.show(a_snapshot())
        progress.show(a_snapshot(complete=1))
        progress.show(a_snapshot(complete=2), last=True)
    assert capsys.readouterr() == (
        "",
        "0/30 done, 0 running, 0 pruned, 0 failed\n2/30 done, 0 running, 0 pruned, 0 failed\n",
    )


def test_a_line_that_says_nothing_new_is_not_repeated(capsys):
    with Progress(Log()) as progress:
        progress.show(a_snapshot(complete=1, left_s=100))
        progress.show(a_snapshot(complete=1, left_s=50), last=True)
    assert capsys.readouterr().err.count("\n") == 1


def test_in_json_a_snapshot_is_an_event_with_numbers(capsys):
    with Progress(Log("json")) as progress:
        progress.show(a_snapshot(complete=3, pruned=2, running=1, failed=4, left_s=12.5))
    line = json.loads(capsys.readouterr().err)
    wanted = {"event": "progress", "done": 5, "trials": 30, "running": 1, "pruned": 2, "failed": 4, "left_s": 12.5}
    assert wanted.items() <= line.items()


def test_on_a_terminal_each_snapshot_is_shown_and_the_log_writes_above_it():
    log = Log()
    log.console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with Progress(log) as progress:
        progress.show(a_snapshot(complete=1))
        progress.show(a_snapshot(complete=2))
        log.event("trial_ended", "trial 2 complete")
    shown = log.console.file.getvalue()
    assert shown.index("1/30 done") < shown.index("2/30 done") < shown.index("trial 2 complete")


def test_the_terminal_gets_its_cursor_back_after_an_error():
    log = Log()
    log.console = Console(file=io.StringIO(), force_terminal=True, width=120)

    def show_and_fail():
        with Progress(log) as progress:
            progress.show(a_snapshot())
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        show_and_fail()
    assert log.console.file.getvalue().rstrip().endswith("\x1b[?25h")
