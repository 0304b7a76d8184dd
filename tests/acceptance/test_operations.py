"""What docs/operations.md has operators install and type: units that systemd takes, lines that read what is logged."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command import Tuner

from storage import PostgresStorage
from storage.coordination import control
from tuner.exits import ExitCode
from tuner.slot import left_checkpoints
from tuner.spec import Spec
from tuner.study.joining import checkpoint_directory, create_study

PAGE = Path(__file__).parents[2] / "docs/operations.md"
UNITS = dict(re.findall(r"^```ini\n# /etc/systemd/system/([\w@.-]+)\n(.*?)^```$", PAGE.read_text(), re.M | re.S))


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze, of the package systemd")
@pytest.mark.parametrize("name", sorted(UNITS))
def test_systemd_has_nothing_to_say_of_a_unit(name: str, tmp_path: Path) -> None:
    unit = tmp_path / name.replace("@.", "@digits.")
    installed = str(Path(sys.executable).with_name("tuner"))
    assert "=/usr/local/bin/tuner " in UNITS[name]
    unit.write_text(UNITS[name].replace("/usr/local/bin/tuner", installed))
    command = ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", str(unit)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_a_unit_starts_again_what_may_go_better_then() -> None:
    assert set(UNITS) == {"tuner-worker@.service", "tuner-dashboard.service"}
    worker = dict(re.findall(r"^(\w+)=(.*)$", UNITS["tuner-worker@.service"], re.M))
    assert worker["Restart"] == "on-failure"
    assert _codes(worker["RestartForceExitStatus"]) == {ExitCode.AGAIN}
    assert _codes(worker["RestartPreventExitStatus"]) == {ExitCode.USAGE, ExitCode.STUDY_FAILED}
    assert _codes(worker["SuccessExitStatus"]) == {ExitCode.HUNG_UP, ExitCode.TERMINATED}
    assert int(worker["TimeoutStopSec"]) > 10  # within which a worker has ended


def _codes(text: str) -> set[int]:
    return set(map(int, text.split()))


def _lines(block: str, directory: Path, tuner: Tuner) -> list[str]:
    """Run a block of the page, and return what it printed."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    bash = ["bash", "-e", "-u", "-o", "pipefail", "-c", block]
    environ = {**os.environ, **tuner.environment, "PATH": path}
    done = subprocess.run(bash, cwd=directory, env=environ, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def _a_deleted_study(storage: PostgresStorage, data_dir: Path) -> Path:
    """Return where the checkpoints are, on this machine, of a study that was deleted from another one."""
    spec: dict[str, Any] = {"objective": {"name": "digits", "code_hash": "0"}, "metric": "accuracy", "epochs": 1}
    study = create_study(
        storage.engine, "gone", Spec.model_validate({**spec, "direction": "maximize", "budget": {"trials": 1}})
    )
    left_checkpoints.note(storage.engine, study, data_dir)
    here = checkpoint_directory(data_dir, study)
    here.mkdir(parents=True)
    control.delete_study(storage.sessions, study.study_id, force=True)
    return here


@pytest.mark.skipif(shutil.which("jq") is None, reason="no jq")
def test_the_page_s_lines_read_what_a_worker_logs_and_what_a_study_tells(
    tuner: Tuner, database: str, tmp_path: Path
) -> None:
    logs, alerts = re.findall(r"^```sh\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
    storage = PostgresStorage(database)
    left = _a_deleted_study(storage, tmp_path / "data")
    storage.engine.dispose()
    search = ["run", "digits", "--trials", "2", "--epochs", "2", "--pruner", "none", "--no-export"]
    done = tuner("--log-format", "json", *search)
    assert done.code == 0
    assert f"deleted {left}: checkpoints of a study that was deleted" in done.stderr
    assert not left.exists()
    went_wrong = {"time": "t", "event": "hung", "worker": "w", "trial": 7, "message": "trial 7 hangs"}
    (tmp_path / "tuner.log").write_text(f"{done.stderr}no JSON\n{json.dumps(went_wrong)}\n")
    read = _lines(logs, tmp_path, tuner)
    assert read[0].split("\t") == ["t", "w", "hung", "7", "trial 7 hangs"]
    assert sorted(line.split("\t")[:2] for line in read[1:3]) == [["0", "COMPLETE"], ["1", "COMPLETE"]]
    assert [line.split("\t")[1] for line in read[3:7]] == ["trial_started", "report", "report", "trial_ended"]
    assert json.loads(read[7])["epochs"] == 4
    assert {"2 trial_ended", "4 report", "1 hung"} <= {" ".join(line.split()) for line in read[8:]}

    assert _lines(alerts, tmp_path, tuner) == []  # all is well
    status = json.loads((tmp_path / "status.json").read_text())
    status |= {"state": "running", "lost": 2, "workers": [{"worker": "w", "lost": True, "silent_s": 60}]}
    status["trials"]["failed"], status["device_seconds"]["idle"] = 6, 1e6
    (tmp_path / "status.json").write_text(json.dumps(status))
    told = _lines(alerts[alerts.index("jq -r '.study as") :], tmp_path, tuner)
    assert told == [
        "digits: lost w",
        "digits: 6 trials failed: {}",
        f"digits: 2 trials wait for a worker since {status['last_seen']}",
        "digits: idle for 1000000 s",
    ]


def test_the_page_s_lines_remove_a_study_and_a_machine(tmp_path: Path) -> None:
    section = PAGE.read_text().partition("\n## Removal\n")[2].partition("\n## ")[0]
    lines = re.findall(r"`(tuner [^`]+)`", section)
    wanted = ["stop STUDY", "delete STUDY --yes", "clean", "clean --dry-run", "worker STUDY", "db delete"]
    assert lines == [f"tuner {line}" for line in wanted]
    stop, delete, _, look, _, delete_database = (line.split()[1:] for line in lines)
    machine = Tuner({"TUNER_DATA_DIR": str(tmp_path / "data")}, tmp_path)
    assert machine("create", "digits", "--study", "STUDY", "--trials", "9").code == 0
    try:
        for command in (stop, delete, look):
            done = machine(*command)
            assert done.code == 0, done.stderr
        assert machine("studies", "--json").json() == []
    finally:
        assert machine(*delete_database, "--yes").code == 0
    left = [row["data_dir"] for row in machine("db", "list", "--json").json()]
    assert str(tmp_path / "data") not in left
