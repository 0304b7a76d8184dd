"""A SLURM of two nodes on this machine: its controller, a daemon for each node, and munge, all of a test's own.

Each node has two GPUs that are none, which SLURM hands out as CUDA_VISIBLE_DEVICES all the same.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from command import wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator

NODES = ("n0", "n1")
_CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
AuthType=auth/munge
# A task that was put back waits for as long as a credential holds, or else for two minutes.
AuthInfo=socket={place}/munge.socket,cred_expire=5
CryptoType=crypto/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmdParameters=config_overrides
ReturnToService=2
SlurmctldPidFile={place}/ctld.pid
SlurmctldPort={ports[0]}
SlurmdPidFile={place}/slurmd-%n.pid
SlurmdSpoolDir={place}/spool-%n
SlurmUser=root
StateSaveLocation={place}/state
SlurmctldLogFile={place}/ctld.log
SlurmdLogFile={place}/slurmd-%n.log
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_min_interval=100000,sched_interval=1,bf_interval=1,batch_sched_delay=0
PriorityType=priority/basic
JobCompType=jobcomp/none
AccountingStorageType=accounting_storage/none
KillWait=15
GresTypes=gpu
NodeName=n0 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 Gres=gpu:2 State=UNKNOWN
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 Gres=gpu:2 State=UNKNOWN
PartitionName=debug Nodes=n0,n1 Default=YES MaxTime=INFINITE State=UP
PartitionName=short Nodes=n0 MaxTime=5 State=UP
"""
_TIMEOUT_S = 30.0


def why_not() -> str | None:
    """Return why this system cannot have such a cluster, None if it can."""
    if os.geteuid() != 0:
        return "SLURM's daemons need root"
    programs = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scancel", "scontrol", "sinfo")
    if missing := [program for program in programs if shutil.which(program) is None]:
        return f"not installed (apt-get install slurm-wlm munge): {', '.join(missing)}"
    return None


@dataclass(frozen=True)
class Cluster:
    """The cluster; commands that have `environment` reach it."""

    place: Path

    @property
    def environment(self) -> dict[str, str]:
        return {"SLURM_CONF": str(self.place / "slurm.conf")}

    def __call__(self, *command: str) -> str:
        """Run one of SLURM's programs and return what it prints."""
        environ = {**os.environ, **self.environment}
        done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout

    def idle(self) -> set[str]:
        """The nodes that are there and have nothing to do."""
        return set(self("sinfo", "--noheader", "--Node", "--states=idle", "--format=%N").split())

    def states(self, job: str) -> dict[str, str]:
        """The state of each task of an array job, by its number, as long as SLURM knows it."""
        shown = self("squeue", "--noheader", "--array", "--states=all", f"--jobs={job}", "--format=%K %T")
        return dict(line.split() for line in shown.splitlines())


def address() -> str:
    """Return an address of this machine that is not its loopback's. Skips the test if there is none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("198.51.100.1", 9))  # sends nothing
        except OSError:
            pytest.skip("this machine has no address but its loopback's")
        found: str = probe.getsockname()[0]
        return found


@contextmanager
def cluster() -> Iterator[Cluster]:
    """Start the cluster, and end it with all that runs in it."""
    with tempfile.TemporaryDirectory(prefix="tuner-slurm-", dir="/tmp") as name:
        place = Path(name)
        place.chmod(0o755)
        found = Cluster(place)
        _configure(place)
        started: list[Path] = []
        try:
            _start(found, started, "munged.pid", "munged", "--force", *_munge_options(place))
            _start(found, started, "ctld.pid", "slurmctld")
            for node in NODES:
                _start(found, started, f"slurmd-{node}.pid", "slurmd", "-N", node)
            wait_for(lambda: found.idle() == set(NODES), "the nodes are idle", _TIMEOUT_S)
            yield found
        finally:
            _end_all(found, started)


def _configure(place: Path) -> None:
    for folder in ("state", *(f"spool-{node}" for node in NODES)):
        (place / folder).mkdir()
    key = place / "munge.key"
    key.touch(0o600)
    key.write_bytes(secrets.token_bytes(1024))
    for number in range(2):
        os.mknod(place / f"gpu{number}", 0o600 | 0o020000, os.makedev(1, 3))
    (place / "gres.conf").write_text(f"Name=gpu File={place}/gpu[0-1]\n")
    (place / "slurm.conf").write_text(_CONFIG.format(host=socket.gethostname(), place=place, ports=_free_ports(3)))


def _free_ports(count: int) -> list[int]:
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


def _munge_options(place: Path) -> list[str]:
    files = {"socket": "munge.socket", "key-file": "munge.key", "pid-file": "munged.pid"}
    files |= {"log-file": "munged.log", "seed-file": "munged.seed"}
    return [f"--{option}={place / name}" for option, name in files.items()]


def _start(found: Cluster, started: list[Path], pid_file: str, *command: str) -> None:
    """Run a daemon, which goes to the background by itself."""
    started.append(found.place / pid_file)
    found(*command)
    wait_for(started[-1].exists, f"{command[0]} runs", _TIMEOUT_S)


def _end_all(found: Cluster, started: list[Path]) -> None:
    """End all jobs, and then the daemons: nothing of theirs is to be kept."""
    try:
        found("scancel", "--me")
        wait_for(lambda: not found("squeue", "--noheader"), "all jobs have ended", _TIMEOUT_S)
    finally:
        for pid_file in reversed(started):
            with suppress(OSError, ValueError):  # it never ran
                os.kill(int(pid_file.read_text()), signal.SIGKILL)
