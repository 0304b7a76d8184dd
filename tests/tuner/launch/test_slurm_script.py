"""The script of a job of SLURM, run by a shell where it does what the shell decides."""

from __future__ import annotations

import os
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from command import wait_for

from tuner.launch.slurm import _count, _minutes
from tuner.launch.slurm_script import Wanted, body, pyxis_options, script

WANTED = Wanted(
    study="it's\nmine",
    label="tuner-it-s-mine-0123abcd",
    arguments=["worker", "--device", "cpu", "it's\nmine"],
    variables={"TUNER_STORAGE": "postgresql://u@db/t?sslmode=require&host=$HOME"},
    programs=Path("/opt/my venv/bin"),
    nodes=4,
    gpus=0,
    cpus=None,
    minutes=None,
    partition=None,
    account=None,
    container=None,
    runtime=None,
    visible=(),
    setup=(),
    extra=(),
    logs=Path("/scratch/50% full"),
)


def options(wanted: Wanted) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in script(wanted).splitlines() if line.startswith("#SBATCH ")]


def test_a_task_asks_for_what_its_worker_is_to_have() -> None:
    assert options(WANTED) == [
        "--job-name=tuner-it-s-mine-0123abcd",
        "--array=0-3",
        "--nodes=1",
        "--ntasks=1",
        "--requeue",
        "--signal=B:USR1@60",
        "--open-mode=append",
        "--output='/scratch/50%% full/tuner-it-s-mine-0123abcd-%A_%a.log'",
    ]
    more = replace(WANTED, gpus=2, cpus=8, minutes=240, partition="gpu", account="me", extra=["-q low --mem=32G"])
    assert set(options(more)) - set(options(WANTED)) == {
        "--gpus-per-node=2",
        "--cpus-per-task=8",
        "--time=240",
        "--partition=gpu",
        "--account=me",
        "-q low --mem=32G",
    }


def test_a_name_cannot_add_a_line_to_the_script() -> None:
    named = replace(WANTED, study="x\n#SBATCH --account=other\nrm -rf /")
    assert script(named).splitlines()[1].startswith(r"# Workers of study x\n#SBATCH --account=other\nrm -rf /, by")
    assert options(named) == options(WANTED)


def test_a_container_is_shown_what_a_worker_needs() -> None:
    inside = replace(
        WANTED, container="team/tuner:1", runtime="pyxis", visible=[Path("/home/u/key"), Path("/data")], cpus=4
    )
    assert (
        "srun --ntasks=1 --cpus-per-task=4 --container-image=team/tuner:1"
        " --container-mounts=/home/u/key:/home/u/key,/data:/data tuner worker"
    ) in script(inside)
    assert "PATH" not in script(inside)
    assert pyxis_options(inside)[0] == "--container-image=team/tuner:1"
    assert "srun" not in body(inside, check=True)
    inside = replace(inside, runtime="apptainer", container="tuner.sif", gpus=1)
    assert "apptainer exec --nv --bind /home/u/key:/home/u/key,/data:/data tuner.sif tuner worker" in script(inside)
    assert "tuner.sif tuner worker --check" in body(inside, check=True)


# Stands in for SLURM's programs and for tuner: each writes how it was called, and tuner ends as the file `end` says.
_TOOL = """#!/bin/bash
echo "$(basename "$0") $*" >> "$CALLS"
"""
_TUNER = (
    _TOOL
    + """
trap 'echo USR1 >> "$CALLS"; exit 75' USR1
[ -f "$END" ] && exit "$(cat "$END")"
echo waits >> "$CALLS"
while true; do sleep 0.05; done
"""
)


@pytest.fixture
def tools(tmp_path: Path) -> dict[str, str]:
    """The environment in which the script finds them."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in {"scontrol": _TOOL, "scancel": _TOOL, "tuner": _TUNER}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "18", "SLURM_ARRAY_JOB_ID": "17"}
    return {**os.environ, **job, "CALLS": str(tmp_path / "calls"), "END": str(tmp_path / "end")}


def shell(tmp_path: Path) -> list[str]:
    wanted = replace(WANTED, programs=tmp_path / "bin")
    return ["bash", "-c", script(wanted).replace("sleep 60", "true")]


@pytest.mark.parametrize(
    ("end", "calls"),
    [
        (0, ["scancel --quiet --state=PENDING 17"]),
        (5, ["scancel --quiet --state=PENDING 17"]),
        (75, ["scontrol requeue 18"]),
        (1, []),
        (3, []),
        (143, []),
    ],
)
def test_what_follows_from_a_worker_s_end(tmp_path: Path, tools: dict[str, str], end: int, calls: list[str]) -> None:
    (tmp_path / "end").write_text(str(end))
    assert subprocess.run(shell(tmp_path), env=tools, check=False).returncode == end
    assert (tmp_path / "calls").read_text().splitlines() == ["tuner worker --device cpu it's", "mine", *calls]


def test_a_worker_that_is_not_there_is_told_as_such(tmp_path: Path, tools: dict[str, str]) -> None:
    (tmp_path / "bin" / "tuner").unlink()
    environ = {**tools, "PATH": os.defpath}
    assert subprocess.run(shell(tmp_path), env=environ, capture_output=True, check=False).returncode == 127


def heedless(pid: int) -> bool:
    """Whether the process sleeps and ignores SIGTERM, as the shell does that waits for its worker."""
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return status["State"].startswith("S") and bool(int(status["SigIgn"], 16) >> signal.SIGTERM - 1 & 1)


def test_the_worker_alone_is_told_of_the_time_limit_and_sigterm_is_left_to_slurm(
    tmp_path: Path, tools: dict[str, str]
) -> None:
    calls = tmp_path / "calls"
    process = subprocess.Popen(shell(tmp_path), env=tools)
    try:
        wait_for(lambda: calls.exists() and "waits" in calls.read_text(), "the worker runs")
        wait_for(lambda: heedless(process.pid), "the shell waits for it")
        process.send_signal(signal.SIGTERM)  # to the shell, which waits on
        process.send_signal(signal.SIGUSR1)
        assert process.wait(30) == 75
    finally:
        process.kill()
        process.wait()
    assert calls.read_text().splitlines()[2:] == ["waits", "USR1", "scontrol requeue 18"]


def test_a_time_limit_that_is_near_before_the_worker_runs_is_not_lost(tmp_path: Path, tools: dict[str, str]) -> None:
    early = script(replace(WANTED, programs=tmp_path / "bin", setup=["kill -USR1 $$"])).replace("sleep 60", "true")
    assert subprocess.run(["bash", "-c", early], env=tools, timeout=30, check=False).returncode == 75
    assert (tmp_path / "calls").read_text().splitlines() == ["scontrol requeue 18"]


def test_lists_of_tasks_and_limits_are_read_as_slurm_writes_them() -> None:
    assert [_count(text) for text in ("3", "0-3", "0-3,7,9-12%2")] == [1, 4, 9]
    assert [_minutes(text) for text in ("5:00", "1:30:00", "2-00:30:00", "infinite")] == [5, 90, 2910, float("inf")]
