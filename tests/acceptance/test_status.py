"""`tuner status` and `tuner release`: what there is to see of a study and its workers, once and as it goes on."""

from __future__ import annotations

import json
import re
import signal
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from command import Running, Tuner, wait_for
from optuna.trial import TrialState, create_trial
from sqlalchemy import Engine, text
from terminal import on_terminal

from storage import EmbeddedServer, open_engine, open_storage
from storage.coordination import claims, standings, studies
from storage.database.sessions import Sessions

MANUAL = Path(__file__).parents[2] / "docs" / "status.md"
# Reports until the file `gate` beside it says that the trial may end.
GATED = """
import threading
from pathlib import Path

GATE = Path(__file__).with_name("gate")

def objective(trial):
    x = trial.suggest_float("x", 0, 1)
    step = 0
    while not GATE.exists():
        trial.report(x, step)
        step += 1
        threading.Event().wait(0.02)
    return x
"""
BUDGET = standings.Budget(trials=4, timeout_s=None, max_failures=10, max_attempts=3)


@pytest.fixture
def objective(tmp_path: Path) -> str:
    path = tmp_path / "gated.py"
    path.write_text(GATED)
    return f"{path}:objective"


@pytest.fixture
def engine(database: str) -> Iterator[Engine]:
    engine = open_engine(database)
    yield engine
    engine.dispose()


@pytest.fixture
def study_id(tuner: Tuner, engine: Engine, objective: str) -> int:
    """The id of a study `gated` of 4 trials."""
    assert tuner("create", objective, "--trials", "4", "--sampler", "random").code == 0
    return studies.find_study(engine, "gated").study_id


def a_worker(
    engine: Engine,
    study_id: int,
    name: str = "gpu-1:7",
    seen: float = 1.0,
    placement: dict[str, str] | None = None,
    **versions: str,
) -> None:
    """A worker of two slots that was seen last so many seconds ago."""
    slots = [
        {"slot": 0, "device": "cuda:0", "share": 0.5, "state": "idle"},
        {"slot": 1, "device": "cuda:1", "share": 1.0, "state": "broken"},
    ]
    execute(
        engine,
        """
        insert into tuner_workers values (:worker_id, :study_id, :name, cast(:slots as jsonb),
            cast(:versions as jsonb), now() - interval '2 h', now() - :seen * interval '1 s', null,
            cast(:placement as jsonb))
        """,
        worker_id=uuid.uuid4(),
        study_id=study_id,
        name=name,
        slots=json.dumps(slots),
        versions=json.dumps(versions),
        seen=seen,
        placement=None if placement is None else json.dumps(placement),
    )


def execute(engine: Engine, statement: str, **values: Any) -> None:
    with engine.begin() as conn:
        conn.execute(text(statement), values)


def a_running_trial(engine: Engine, study_id: int, worker: str = "gpu-1:7") -> claims.Claim:
    held = claims.claim(Sessions(engine), study_id, BUDGET, claims.Holder(worker=worker, device="cuda:0", share=0.5))
    assert isinstance(held, claims.Claim)
    execute(
        engine,
        """
        insert into trial_intermediate_values (trial_id, step, intermediate_value, intermediate_value_type)
        values (:trial_id, 3, 0.25, 'FINITE')
        """,
        trial_id=held.trial_id,
    )
    return held


def a_complete_trial(engine: Engine) -> None:
    study = optuna.load_study(study_name="gated", storage=open_storage(engine.url.render_as_string(False)))
    x = optuna.distributions.FloatDistribution(0, 1)
    study.add_trial(create_trial(value=0.5, params={"x": 0.5}, distributions={"x": x}))


def paths(fields: Any, prefix: str = "") -> Iterator[str]:
    """The path of each field in a document, as docs/status.md writes it."""
    if isinstance(fields, list):
        for item in fields:
            yield from paths(item, f"{prefix}[]")
    elif isinstance(fields, dict):
        for name, value in fields.items():
            path = f"{prefix}.{name}" if prefix else name
            yield path
            if path not in ("failures", "best.params", "workers[].versions"):  # which have names of their own
                yield from paths(value, path)


def test_status_shows_the_workers_their_trials_and_the_cost(tuner: Tuner, engine: Engine, study_id: int) -> None:
    a_worker(engine, study_id, torch="2.10.0", tuner="0.1.0")
    a_running_trial(engine, study_id)
    a_complete_trial(engine)
    shown = re.sub(r"\d+:\d\d(:\d\d)?", "TIME", tuner("status", "gated").stdout).splitlines()
    assert re.fullmatch(r"pace      \d+(\.\d)? trials an hour, about TIME left", shown.pop(3))
    assert re.fullmatch(r"cost      TIME of devices' time: (TIME running, )?TIME idle", shown.pop(5))
    assert shown == [
        "study     gated: gated.py:objective, minimize value",
        "state     running",
        "trials    1/4 done (1 complete, 0 pruned), 1 running, 0 waiting, 0 failed",
        "best      0.5 (trial 1)",
        "params    x=0.5",
        "workers   1",
        "versions  torch 2.10.0, tuner 0.1.0",
        "  worker   slot  device       state    trial  epoch  value  last seen",
        "  gpu-1:7  0     cuda:0 x0.5  running  0      3      0.25   TIME ago",
        "  gpu-1:7  1     cuda:1       broken   -      -      -      TIME ago",
    ]


def test_every_field_of_the_json_is_in_the_manual_and_the_manual_has_no_others(
    tuner: Tuner, engine: Engine, study_id: int
) -> None:
    placement = {"engine": "slurm", "job": "17", "task": "0", "node": "n1"}
    a_worker(engine, study_id, placement=placement, torch="2.10.0")
    held = a_running_trial(engine, study_id)
    a_complete_trial(engine)
    failed = create_trial(state=TrialState.FAIL, user_attrs={"failure": "oom", "failure_message": "CUDA"})
    optuna.load_study(study_name="gated", storage=open_storage(engine.url.render_as_string(False))).add_trial(failed)
    found = tuner("status", "gated", "--json").json()
    documented = re.findall(r"^\| `([^`]+)` \|", MANUAL.read_text().partition("## `--json`")[2], re.MULTILINE)
    assert list(dict.fromkeys(paths(found))) == documented
    (worker,) = found["workers"]
    first, second = worker["slots"]
    assert worker["placed_by"] == {**placement, "state": None}  # no SLURM is here to ask
    assert "  slurm 17_0 on n1" in tuner("status", "gated").stdout
    assert (worker["worker"], worker["lost"], worker["versions"]) == ("gpu-1:7", False, {"torch": "2.10.0"})
    assert (first["device"], first["share"], first["state"]) == ("cuda:0", 0.5, "running")
    assert {**first["trial"], "started_at": None} == {
        "number": held.number,
        "attempt": 1,
        "started_at": None,
        "epoch": 3,
        "value": 0.25,
    }
    assert (second["state"], second["trial"]) == ("broken", None)
    assert found["failures"] == {"oom": [1, "CUDA"]}
    assert found["device_seconds"]["idle"] > 3600
    assert (found["workers_lost"], found["workers_ended"]) == (0, 0)


def test_a_worker_that_was_killed_is_shown_as_lost_for_an_hour(tuner: Tuner, engine: Engine, study_id: int) -> None:
    # Had the server started after they fell silent, that would be why.
    up_s = text("select extract(epoch from now() - pg_postmaster_start_time())")
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as conn:
        wait_for(lambda: conn.execute(up_s).scalar_one() > 31, "the server runs for half a minute")
    a_worker(engine, study_id, "long-ago:1", seen=4000)
    a_worker(engine, study_id, "killed:2", seen=2000)
    a_worker(engine, study_id, "there:3")
    a_worker(engine, study_id, "ended:4")
    execute(engine, "update tuner_workers set ended_at = last_seen where name = 'ended:4'")
    shown = tuner("status", "gated").stdout
    assert "workers   1, 1 lost, 1 lost more than 1:00:00 ago, 1 ended\n" in shown
    assert re.search(r"killed:2 .* lost .* silent for 33:2\d\n", shown)
    assert "there:3" in shown
    assert not re.search("long-ago|ended:4", shown)
    found = tuner("status", "gated", "--json").json()
    assert {worker["worker"]: worker["lost"] for worker in found["workers"]} == {
        "long-ago:1": True,
        "killed:2": True,
        "there:3": False,
    }
    assert (found["workers_lost"], found["workers_ended"]) == (2, 1)
    assert found["workers"][0]["silent_s"] == pytest.approx(4000, abs=60)
    assert found["workers_live"] == 1
    assert found["last_seen"] >= max(its["last_seen"] for its in found["workers"])  # the one that ended tells as well
    a_running_trial(engine, study_id, "killed:2")  # whose lease has not run out yet
    assert tuner("status", "gated", "--json").json()["state"] == "idle"
    a_running_trial(engine, study_id, "there:3")
    assert tuner("status", "gated", "--json").json()["state"] == "running"
    (listed,) = tuner("studies", "--json").json()
    assert (listed["state"], listed["workers_live"], listed["last_seen"] is None) == ("running", 1, False)
    ran = [
        {name: each[name] for name in ("worker", "machine", "attempts")}
        for each in tuner("trials", "gated", "--json").json()
    ]
    assert ran == [
        {"worker": "killed:2", "machine": "killed", "attempts": 1},
        {"worker": "there:3", "machine": "there", "attempts": 1},
    ]


def test_versions_that_differ_are_shown_with_who_has_them(tuner: Tuner, engine: Engine, study_id: int) -> None:
    for name, version in (("a:1", "2.10"), ("b:2", "2.11"), ("c:3", "2.10")):
        a_worker(engine, study_id, name, torch=version)
    shown = tuner("status", "gated").stdout
    assert "versions  torch 2.10 (a:1, c:3)\nversions  torch 2.11 (b:2)\n" in shown


def test_names_from_the_database_cannot_drive_the_terminal(tuner: Tuner, engine: Engine, objective: str) -> None:
    hostile = "\x1b[2J\n[bold red]x[/]\u202e"
    assert tuner("create", objective, "--study", hostile).code == 0
    study_id = studies.find_study(engine, hostile).study_id
    a_worker(engine, study_id, hostile, **{hostile: hostile})
    shown = tuner("status", hostile).stdout
    escaped = "\\x1b[2J\\n[bold red]x[/]\\u202e"
    assert f"study     {escaped}: " in shown
    assert f"versions  {escaped} {escaped}\n" in shown
    assert f"  {escaped}  0     cuda:0" in shown
    with on_terminal(tuner, "status", hostile, "--watch") as terminal:
        terminal.wait_for("Ctrl-C ends this")
        assert f"  {escaped}  0     cuda:0" in "\n".join(terminal.screen)
        terminal.type("\x03")
        assert terminal.exit_code() == 130
        assert "\x1b[2J" not in terminal.written


def test_a_study_of_another_program_is_shown(tuner: Tuner, database: str) -> None:
    study = optuna.create_study(study_name="theirs", storage=open_storage(database))
    study.add_trial(create_trial(value=1.0))
    shown = [line for line in tuner("status", "theirs").stdout.splitlines() if not line.startswith("pace")]
    assert shown == [
        "study     theirs: not of tuner, minimize value",
        "state     idle",
        "trials    1 done (1 complete, 0 pruned), 0 running, 0 waiting, 0 failed",
        "best      1 (trial 0)",
        "params    -",
    ]
    found = tuner("status", "theirs", "--json").json()
    assert (found["workers"], found["left_s"], found["device_seconds"]["idle"]) == ([], None, 0.0)


def test_a_study_whose_budget_is_used_up_is_finished_even_if_it_was_stopped(
    tuner: Tuner, tmp_path: Path, objective: str, study_id: int
) -> None:
    (tmp_path / "gate").touch()
    assert tuner("worker", "gated", "--objective", objective).code == 0
    assert tuner("stop", "gated").code == 0
    found = tuner("status", "gated", "--json").json()
    assert (found["state"], found["reason"]) == ("finished", "the budget of 4 trials is used up")
    assert found["device_seconds"]["complete"] > 0
    watched = tuner("status", "gated", "--watch")
    assert (watched.code, watched.stdout, watched.stderr) == (0, tuner("status", "gated").stdout, "")


def test_a_released_trial_runs_again_and_its_worker_drops_it(
    tuner: Tuner, tmp_path: Path, engine: Engine, objective: str, study_id: int
) -> None:
    with tuner.start("worker", "gated", "--objective", objective, "--log-format", "json") as worker:
        wait_for(lambda: bool(worker.events("trial_started")), "a trial runs")
        released = tuner("release", "gated", "0")
        name = re.fullmatch(r"trial 0 waits; (\S+:\d+-\w+) ran it, and drops it at its next report\n", released.stdout)
        assert (released.code, name is not None) == (0, True), released
        wait_for(lambda: len(worker.events("trial_started")) == 2, "it runs again")
        assert [event["trial"] for event in worker.events("trial_released")] == [0]
        again = tuner("release", "gated", "0", "--json").json()
        assert again == {"study": "gated", "number": 0, "released": True, "worker": name and name[1]}
        (tmp_path / "gate").touch()
        assert worker.finish().code == 0
    started = [(event["trial"], event["attempt"]) for event in worker.events("trial_started")]
    assert started == [(0, 1), (0, 1), (0, 1), (1, 1), (2, 1), (3, 1)]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("gated", "0"), 1, "study 'gated': trial 0 is complete, and not running; 'tuner trials' lists them"),
        (("gated", "9"), 1, "study 'gated': there is no trial 9; 'tuner trials' lists them"),
        (("gated", str(10**12)), 1, f"there is no trial {10**12}"),
        (("nobody", "0"), 1, "no study named 'nobody' in"),
        (("gated", "first"), 2, "Invalid value for 'NUMBER'"),
        (("gated",), 2, "Missing argument 'NUMBER'"),
    ],
)
def test_what_cannot_be_released_is_refused_in_one_line(
    tuner: Tuner, engine: Engine, study_id: int, arguments: tuple[str, ...], code: int, message: str
) -> None:
    a_complete_trial(engine)
    refused = tuner("release", *arguments)
    assert (refused.code, message in refused.error()) == (code, True), refused


def test_a_trial_of_another_program_is_released_with_a_warning(tuner: Tuner, database: str) -> None:
    study = optuna.create_study(study_name="theirs", storage=open_storage(database))
    study.add_trial(create_trial(state=TrialState.RUNNING))
    assert "no worker of tuner ran it" in tuner("release", "theirs", "0").stdout
    assert study.get_trials()[0].state == TrialState.WAITING


def test_on_a_terminal_the_display_stays_in_its_place_and_follows_until_ctrl_c(
    tuner: Tuner, engine: Engine, study_id: int
) -> None:
    with on_terminal(tuner, "status", "gated", "--watch", "--interval", "0.2") as terminal:
        terminal.wait_for("0/4 done")
        a_worker(engine, study_id)
        a_running_trial(engine, study_id)
        terminal.wait_for("gpu-1:7  0     cuda:0 x0.5  running  0")
        a_complete_trial(engine)
        terminal.wait_for("1/4 done")
        terminal.type("\x03")
        assert terminal.exit_code() == 130
        screen = [line for line in terminal.screen if line.strip("^C ")]
        assert [line.split()[0] for line in screen[:3]] == ["study", "state", "trials"]
        assert sum(line.startswith("study ") for line in screen) == 1
        assert "Traceback" not in terminal.written
        assert terminal.written.rindex("\x1b[?25h") > terminal.written.rindex("\x1b[?25l")  # the cursor is back


def test_a_display_that_is_terminated_gives_the_cursor_back(tuner: Tuner, study_id: int) -> None:
    with on_terminal(tuner, "status", "gated", "--watch") as terminal:
        terminal.wait_for("Ctrl-C ends this")
        terminal.process.send_signal(signal.SIGTERM)
        assert terminal.exit_code() == 143
        assert terminal.written.rstrip().endswith("\x1b[?25h")


def test_watching_ends_with_the_study(tuner: Tuner, tmp_path: Path, objective: str, study_id: int) -> None:
    with on_terminal(tuner, "status", "gated", "--watch", "--interval", "0.2", rows=8, columns=40) as terminal:
        terminal.wait_for("0/4 done")
        (tmp_path / "gate").touch()
        assert tuner("worker", "gated", "--objective", objective).code == 0
        assert terminal.exit_code() == 0
        # The whole of it in the end, though the terminal was too small; cut, and not wrapped.
        assert "state     finished: the budget of 4 tri…" in terminal.screen
        assert any(line.startswith("params ") for line in terminal.screen)
        assert not any("Ctrl-C" in line for line in terminal.screen)


def test_while_a_query_hangs_the_display_tells_and_ctrl_c_ends_it_at_once(
    tuner: Tuner, engine: Engine, study_id: int
) -> None:
    with on_terminal(tuner, "status", "gated", "--watch", "--interval", "0.2") as terminal:
        terminal.wait_for("0/4 done")
        with engine.begin() as conn:
            conn.execute(text("lock table trials in access exclusive mode"))
            terminal.wait_for("ago; waiting for the database")
            terminal.type("\x03")
            assert terminal.exit_code() == 130
        assert "Traceback" not in terminal.written


def test_watching_a_study_that_is_deleted_ends_with_one_line(tuner: Tuner, study_id: int) -> None:
    with tuner.start("status", "gated", "--watch", "--interval", "0.1") as watching:
        read_block(watching)
        assert tuner("delete", "gated", "--yes").code == 0
        done = watching.finish()
        assert (done.code, "was deleted" in done.error()) == (1, True)


def read_block(watching: Running) -> list[str]:
    """The lines up to the empty one that ends a block."""
    assert watching.process.stdout is not None
    return list(iter(watching.process.stdout.readline, "\n"))


def test_off_a_terminal_each_look_is_a_block_of_lines(tuner: Tuner, engine: Engine, study_id: int) -> None:
    with tuner.start("status", "gated", "--watch", "--interval", "0.1") as watching:
        assert "".join(read_block(watching)) == tuner("status", "gated").stdout
        a_complete_trial(engine)
        wait_for(lambda: "1/4 done" in "".join(read_block(watching)), "a block with the trial")
        watching.process.send_signal(signal.SIGINT)
        done = watching.finish()
    assert (done.code, done.stderr) == (130, "")
    assert "\x1b" not in done.stdout


def test_for_programs_each_look_is_a_line_of_json(tuner: Tuner, engine: Engine, study_id: int) -> None:
    with tuner.start("status", "gated", "--watch", "--json", "--interval", "0.1") as watching:
        assert watching.process.stdout is not None
        documents = map(json.loads, watching.process.stdout)
        first = next(documents)
        assert first.keys() == tuner("status", "gated", "--json").json().keys()
        a_complete_trial(engine)
        wait_for(lambda: next(documents)["trials"]["complete"] == 1, "a line with the trial")
        watching.process.send_signal(signal.SIGINT)
        assert watching.finish().code == 130


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[EmbeddedServer]:
    """A server of the test's own, which it may stop."""
    server = EmbeddedServer(tmp_path / "data")
    try:
        server.start()
        yield server
    finally:
        server.destroy()


@pytest.fixture
def alone(own_server: EmbeddedServer, tmp_path: Path) -> Tuner:
    """The command line on a study of that server."""
    tuner = Tuner({"TUNER_STORAGE": own_server.url(), "TUNER_DATA_DIR": str(tmp_path / "data")}, tmp_path)
    (tmp_path / "gated.py").write_text(GATED)
    assert tuner("create", "gated.py:objective", "--trials", "4").code == 0
    return tuner


def test_a_display_survives_an_outage(own_server: EmbeddedServer, alone: Tuner) -> None:
    with on_terminal(alone, "status", "gated", "--watch", "--interval", "0.2") as terminal:
        terminal.wait_for("Ctrl-C ends this")
        own_server.stop()
        terminal.wait_for("trying again: ")
        assert any(line.startswith("study     gated") for line in terminal.screen)
        own_server.start()
        terminal.wait_for("Ctrl-C ends this")
        terminal.type("\x03")
        assert terminal.exit_code() == 130
        assert "Traceback" not in terminal.written


def test_lines_survive_an_outage_and_the_log_tells_of_it_once(own_server: EmbeddedServer, alone: Tuner) -> None:
    arguments = ("status", "gated", "--watch", "--json", "--interval", "0.1", "--log-format", "json")
    with alone.start(*arguments) as watching:
        stdout = watching.process.stdout
        assert stdout is not None
        stdout.readline()
        drained = threading.Thread(target=lambda: [json.loads(line) for line in stdout], daemon=True)
        drained.start()
        own_server.stop()
        wait_for(lambda: bool(watching.events("database_away")), "the outage is told")
        own_server.start()
        wait_for(lambda: bool(watching.events("database_back")), "its end is told")
        watching.process.send_signal(signal.SIGINT)
        drained.join(30)
        assert watching.process.wait(30) == 130
    assert [len(watching.events(f"database_{what}")) for what in ("away", "back")] == [1, 1]


def test_what_cannot_be_reached_at_first_is_an_error(tuner: Tuner) -> None:
    done = tuner("status", "gated", "--watch", TUNER_STORAGE="postgresql://tuner@127.0.0.1:1/tuner")
    assert (done.code, "cannot reach PostgreSQL" in done.error()) == (3, True)
    assert tuner("status", "gated", "--watch", "--interval", "0").code == 2
