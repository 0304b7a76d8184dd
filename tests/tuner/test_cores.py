"""Whose the cores are: affinity, the container's limit, and the workers of one machine, which are processes here."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from tuner import cores

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

N_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
_SIT = "import sys, pathlib; from tuner.cores import Seat; seat = Seat(sys.argv[1], 3, pathlib.Path(sys.argv[2]));"


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have none of the workers of other tests among ours, and no limit of this machine's."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    groups(tmp_path, monkeypatch, "0::/\n")
    monkeypatch.delenv("SLURM_CPUS_ON_NODE", raising=False)


def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str, **files: str) -> None:
    """Have these control groups: what the kernel says of a process's own, and what files are in them."""
    root = tmp_path / "groups"
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    (tmp_path / "own").write_text(own)
    monkeypatch.setattr(cores, "_OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(cores, "_GROUPS", root)


@contextmanager
def seated(worker: str, n_slots: int, data_dir: Path) -> Iterator[None]:
    seat = cores.Seat(worker, n_slots, data_dir)
    try:
        yield
    finally:
        seat.close()


def test_a_worker_alone_has_all_cores_for_its_slots(tmp_path: Path) -> None:
    with seated("ours", 2, tmp_path):
        assert cores.share("ours", 1, tmp_path) == N_CORES
        assert cores.share("ours", 2, tmp_path) == max(1, N_CORES // 2)
        assert cores.share("ours", 1000, tmp_path) == 1


def test_slots_with_nothing_to_do_leave_their_cores_to_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cores, "_allowed", lambda: cores._Allowed(cores=tuple(range(12))))
    ours, theirs = cores.Seat("ours", 12, tmp_path), cores.Seat("theirs", 1000, tmp_path)
    assert cores.share("ours", 12, tmp_path) == 1
    theirs.tell(1)
    ours.tell(3)
    assert cores.share("ours", 12, tmp_path) == 3
    assert cores.share("ours", 12, tmp_path, counts_idle=True) == 1
    assert cores.share("theirs", 1000, tmp_path) == 3
    ours.tell(11)
    assert cores.share("ours", 12, tmp_path) == 1
    theirs.close()
    ours.tell(1)
    assert cores.share("ours", 12, tmp_path) == 12
    ours.close()


@pytest.mark.parametrize("shared", ["data", "tmp"])
def test_workers_share_the_cores_whose_data_or_temporary_directory_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared: str
) -> None:
    monkeypatch.setattr(cores, "_allowed", lambda: cores._Allowed(cores=tuple(range(12))))
    theirs = tmp_path if shared == "data" else tmp_path / "another"
    with seated("ours", 2, tmp_path):
        if shared == "data":
            (tmp_path / "tmp2").mkdir()
            monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp2"))
        assert cores.share("ours", 2, tmp_path) == 6
        with seated("theirs", 1, theirs):
            assert cores.share("ours", 2, tmp_path) == 4
            assert cores.share("theirs", 1, theirs) == 4
        assert cores.share("ours", 2, tmp_path) == 6
    assert not [path for path in tmp_path.rglob("*") if "ours" in path.name or "theirs" in path.name]


def test_a_worker_that_was_killed_has_no_core_any_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    with subprocess.Popen(
        [sys.executable, "-c", f"{_SIT} print(flush=True); sys.stdin.read()", "theirs", tmp_path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as worker:
        assert worker.stdout is not None
        worker.stdout.readline()
        assert cores.share("ours", 1, tmp_path) == max(1, N_CORES // 4)
        worker.send_signal(signal.SIGKILL)
        worker.wait()
    assert len(list(tmp_path.rglob("*.theirs.seat"))) == 2
    assert cores.share("ours", 1, tmp_path) == N_CORES
    assert not list(tmp_path.rglob("*theirs*"))


def test_workers_on_other_cores_or_other_machines_take_none_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def on(*numbers: int) -> None:
        monkeypatch.setattr(cores, "_allowed", lambda: cores._Allowed(cores=numbers))

    on(4, 5, 6, 7)
    with seated("beside", 4, tmp_path):
        on(0, 1, 2, 3)
        assert cores.share("ours", 1, tmp_path) == 4
        on(2, 3, 4, 5)
        assert cores.share("ours", 1, tmp_path) == 2  # 2 and 2 fifths
        monkeypatch.setattr(cores, "_machine", lambda: "another")
        assert cores.share("ours", 1, tmp_path) == 4


@pytest.mark.parametrize(
    ("own", "files", "wanted"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/pod/one\n", {"pod/one/cpu.max": "max 100000\n", "pod/cpu.max": "200000 100000\n"}, 2.0),
        ("0::/of/the/machine\n", {"cpu.max": "300000 100000\n"}, 3.0),  # which the container does not see
        ("0::/../../elsewhere\n", {"cpu.max": "50000 100000\n"}, 0.5),
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/\n", {"cpu.max": "what is this\n"}, None),
        ("3:cpuset:/\n1:cpu,cpuacct:/a\n", {"cpu,cpuacct/a/cpu.cfs_quota_us": "25000"}, 0.25),
        ("1:cpu:/a\n0::/\n", {"cpu/a/cpu.cfs_quota_us": "250000"}, 2.5),
        ("1:cpu:/a\n0::/\n", {"cpu/a/cpu.cfs_quota_us": "-1"}, None),
    ],
)
def test_a_container_s_limit_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str, files: dict[str, str], wanted: float | None
) -> None:
    periods = {name.replace("quota", "period"): "100000" for name in files if "quota" in name}
    groups(tmp_path, monkeypatch, own, **files, **periods)
    allowed = cores._allowed()
    assert allowed.limit == (float("inf") if wanted is None else wanted)
    assert cores.count() == max(1, min(N_CORES, int(wanted or N_CORES)))


def test_only_those_who_are_in_the_container_share_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "_allowed", lambda: cores._Allowed(cores=tuple(range(16)), limit=4.0, group="1:1"))
    with seated("inside", 1, tmp_path):
        monkeypatch.setattr(cores, "_allowed", lambda: cores._Allowed(cores=tuple(range(16)), limit=8.0, group="1:2"))
        with seated("outside", 2, tmp_path):
            assert cores.share("outside", 2, tmp_path) == 4
            monkeypatch.setattr(
                cores, "_allowed", lambda: cores._Allowed(cores=tuple(range(16)), limit=4.0, group="1:1")
            )
            assert cores.share("ours", 1, tmp_path) == 2


def test_what_slurm_gave_a_job_is_the_job_s_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(16), raising=False)
    for name, value in {"SLURM_JOB_ID": "7", "SLURM_CPUS_ON_NODE": "6"}.items():
        monkeypatch.setenv(name, value)
    with seated("ours", 2, tmp_path):
        assert (cores.count(), cores.share("ours", 2, tmp_path)) == (6, 3)
        with seated("in the same job", 1, tmp_path):
            assert cores.share("ours", 2, tmp_path) == 2
        monkeypatch.setenv("SLURM_JOB_ID", "8")
        with seated("in another job", 1, tmp_path):
            monkeypatch.setenv("SLURM_JOB_ID", "7")
            assert cores.share("ours", 2, tmp_path) == 3


def test_a_worker_that_can_keep_no_file_counts_its_own_slots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "file"))
    with seated("ours", 2, tmp_path / "file"):
        assert cores.share("ours", 2, tmp_path / "file") == max(1, N_CORES // 2)


def test_what_is_no_seat_is_passed_over(tmp_path: Path) -> None:
    with seated("theirs", 1, tmp_path):
        for path in tmp_path.rglob("*.seat"):
            path.write_bytes(b"[]")
        (tmp_path / "cores" / "not.ours").write_text("")
        os.utime(tmp_path / "cores" / "not.ours", (0, 0))
        assert cores.share("ours", 1, tmp_path) == N_CORES
        assert (tmp_path / "cores" / "not.ours").exists()
