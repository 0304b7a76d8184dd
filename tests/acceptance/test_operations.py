"""What docs/operations.md has operators install: units that systemd takes, with codes that are the command line's."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tuner.exits import ExitCode

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
