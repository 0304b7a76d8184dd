import os
import sys
import time

import pytest
import torch

from storage import open_engine
from storage.database.errors import UnreachableError
from tuner import doctor
from tuner.errors import TunerError


@pytest.fixture
def open_database(database):
    engines = []

    def open_now():
        engines.append(open_engine(database))
        return engines[-1]

    yield open_now
    for engine in engines:
        engine.dispose()


def by_name(checks):
    return {check.name: check for check in checks}


@pytest.mark.slow
def test_everything_is_looked_at_for_real(tmp_path, open_database, database):
    checks = by_name(doctor.check_all(tmp_path / "new", open_database))
    assert list(checks) == ["python", "torch", "data", "database", "clock", "records", "objectives"]
    assert all(check.ok for check in checks.values()), checks
    assert checks["torch"].found.startswith(f"{torch.__version__} on ")
    assert "PostgreSQL 1" in checks["database"].found
    assert "digits" in checks["objectives"].found
    assert checks["clock"].found.endswith(" s from the database's")
    assert f"{os.cpu_count()} cores" in checks["python"].found


@pytest.fixture
def without_torch(monkeypatch):
    """Torch takes seconds to import in the process that the check starts."""
    monkeypatch.setattr(doctor, "_torch", lambda: "left out")


@pytest.mark.parametrize("error", [UnreachableError("no server at db"), TunerError("no such file")])
def test_a_check_that_fails_says_why_and_the_others_go_on(tmp_path, without_torch, error):
    def refuse():
        raise error

    checks = by_name(doctor.check_all(tmp_path, refuse))
    assert (checks["database"].ok, checks["database"].found) == (False, str(error))
    assert checks["objectives"].ok


@pytest.mark.parametrize(("skew_s", "side"), [(3600, "ahead of"), (-3600, "behind")])
def test_a_clock_that_is_wrong_is_told(tmp_path, without_torch, open_database, monkeypatch, skew_s, side):
    right = time.time
    monkeypatch.setattr(time, "time", lambda: right() + skew_s)
    clock = by_name(doctor.check_all(tmp_path, open_database))["clock"]
    assert (clock.ok, f"s {side} the database's; set both by NTP" in clock.found) == (False, True)


def test_a_data_directory_that_cannot_be_made_is_told_with_advice(tmp_path, without_torch, open_database):
    (tmp_path / "file").touch()
    data = by_name(doctor.check_all(tmp_path / "file" / "data", open_database))["data"]
    assert not data.ok
    assert data.found == f"cannot write to {tmp_path / 'file' / 'data'}: Not a directory; choose another --data-dir"


def test_a_data_directory_that_others_may_write_to_is_told(tmp_path, without_torch, open_database):
    tmp_path.chmod(0o777)
    data = by_name(doctor.check_all(tmp_path, open_database))["data"]
    assert not data.ok
    assert data.found.startswith(f"{tmp_path} may be written to by everybody (mode 0777)")


def test_a_disk_with_little_room_is_told(tmp_path, without_torch, open_database, monkeypatch):
    monkeypatch.setattr(doctor, "MIN_FREE_BYTES", 1 << 60)
    data = by_name(doctor.check_all(tmp_path, open_database))["data"]
    assert not data.ok
    assert "MB free, wanted" in data.found
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("torch_code", "told"),
    [
        (
            "raise ImportError('libcudart.so.13 is missing')",
            "ImportError: libcudart.so.13 is missing; install it again",
        ),
        ("import os; os._exit(3)", "torch does not run: no output"),
        ("import threading; threading.Event().wait(60)", "torch did not import within 0.5 s"),
    ],
)
def test_a_broken_torch_is_told(tmp_path, monkeypatch, open_database, torch_code, told):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "torch.py").write_text(torch_code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "broken"))
    if "Event" in torch_code:
        monkeypatch.setattr(doctor, "TORCH_TIMEOUT_S", 0.5)
    check = by_name(doctor.check_all(tmp_path, open_database))["torch"]
    assert not check.ok
    assert told in check.found
    assert "\n" not in check.found


def test_a_machine_without_objectives_is_told_how_to_get_them(tmp_path, without_torch, open_database, monkeypatch):
    metadata = tmp_path / "tuner-1.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: tuner\nVersion: 1.0\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])  # instead of site-packages: tuner is there, no objective is
    checks = by_name(doctor.check_all(tmp_path, open_database))
    assert not checks["objectives"].ok
    assert "'pip install .'" in checks["objectives"].found
