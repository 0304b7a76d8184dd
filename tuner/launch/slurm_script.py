"""The script of a job of SLURM: what its tasks ask for, how they come to a worker, and what follows from its end."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, TypeAlias

from tuner.text import printable

SIGNAL_S: Final = 60
"""How long before the time limit a worker is told to give its trials back; SLURM may do it a minute earlier."""
MIN_MINUTES: Final = 2
"""A shorter limit would be near as soon as a task begins."""

Runtime: TypeAlias = Literal["pyxis", "apptainer", "singularity"]

# A shell that waits is woken by a signal that it heeds, and waits again for the worker's own end. What comes before the
# time limit is for this shell alone. SIGTERM is not passed on, as SLURM sends it to the worker as well, which a second
# one would end at once; and from the worker's start on it is ignored (a trap would be the worker's default, what is
# ignored is not), as a signal that comes while the shell turns to wait again is not acted upon until the worker ends.
_TRAPS: Final = """\
worker= near= woken=
trap 'woken=$worker near=yes; [ "$worker" ] && kill -USR1 "$worker" 2> /dev/null' USR1
trap 'woken=$worker' TERM
"""
_RUN: Final = """\
code=75
if [ -z "$near" ]; then
    {command} &
    worker=$!
    trap '' TERM
    [ "$near" ] && sleep 1 && kill -USR1 "$worker"  # a process is deaf until it runs its own program
    code=127 woken=yes
fi
while [ "$woken" ]; do
    woken=
    wait "$worker"
    ended=$?
    [ "$ended" = 127 ] || code=$ended
done
case $code in
    75 | 138)  # it made room, or had not begun: it is to be run again, and that ends this script
        scontrol requeue "$SLURM_JOB_ID" && sleep 60 ;;
    0 | 5)  # the study is over, and so it is for tasks that wait
        scancel --quiet --state=PENDING "$SLURM_ARRAY_JOB_ID" ;;
esac
exit "$code"
"""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Workers of a study that SLURM is to run: each a task, on one node, that has so much of it.

    `arguments` are those of `tuner`, `variables` what is set for it and never a secret, `programs` where it lies.
    `setup` are lines for the shell before it, `extra` further options of sbatch. `visible` are files and directories
    that a container has to be shown.
    """

    study: str
    label: str
    arguments: Sequence[str]
    variables: Mapping[str, str]
    programs: Path
    nodes: int
    gpus: int
    cpus: int | None
    minutes: int | None
    partition: str | None
    account: str | None
    container: str | None
    runtime: Runtime | None
    visible: Sequence[Path]
    setup: Sequence[str]
    extra: Sequence[str]
    logs: Path

    def resources(self) -> dict[str, str | int]:
        """Return the options that say what a task has of a node, and of which."""
        asked: dict[str, str | int | None] = {
            "nodes": 1,
            "gpus-per-node": self.gpus or None,
            "cpus-per-task": self.cpus,
            "partition": self.partition,
            "account": self.account,
        }
        return {name: value for name, value in asked.items() if value is not None}


def script(wanted: Wanted) -> str:
    """Return the script that sbatch takes."""
    logs = str(wanted.logs / f"{wanted.label}").replace("%", "%%")
    options: dict[str, str | int | None] = {
        "job-name": wanted.label,
        "array": f"0-{wanted.nodes - 1}",
        **wanted.resources(),
        "ntasks": 1,
        "time": wanted.minutes,
        "requeue": None,
        "signal": f"B:USR1@{SIGNAL_S}",
        "open-mode": "append",
        "output": f"{logs}-%A_%a.log",
    }
    if wanted.minutes is None:
        del options["time"]
    lines = [f"--{name}" if value is None else f"--{name}={shlex.quote(str(value))}" for name, value in options.items()]
    lines += wanted.extra
    head = ["#!/bin/bash", f"# Workers of study {printable(wanted.study)}, by 'tuner launch slurm'."]
    return "\n".join([*head, *(f"#SBATCH {line}" for line in lines), "", _TRAPS + body(wanted)])


def body(wanted: Wanted, *, check: bool = False) -> str:
    """Return what the script does, or with `check` what only sees whether a worker could run there.

    With pyxis that begins in the container: `pyxis_options` are those of the step that it is.
    """
    lines = [f"export {name}={shlex.quote(value)}" for name, value in wanted.variables.items()]
    if wanted.container is None:
        lines.append(f'export PATH={shlex.quote(str(wanted.programs))}:"$PATH"')
    if not (check and wanted.runtime == "pyxis"):
        lines += wanted.setup
    arguments = [*wanted.arguments[:1], *(["--check"] if check else []), *wanted.arguments[1:]]
    command = shlex.join([*_container(wanted, check=check), "tuner", *arguments])
    if check:
        return "\n".join(['echo "$SLURMD_NODENAME"', *lines, f"exec {command}"])
    return "\n".join([*lines, _RUN.format(command=command)])


def pyxis_options(wanted: Wanted) -> list[str]:
    """Return the options of srun that start a step in the container; none without pyxis."""
    if wanted.runtime != "pyxis":
        return []
    mounts = [f"--container-mounts={_mounts(wanted)}"] if wanted.visible else []
    return [f"--container-image={wanted.container}", *mounts]


def _container(wanted: Wanted, *, check: bool) -> Iterator[str]:
    """Yield the command that runs commands in the container, if there is one and we are not in it."""
    if wanted.runtime == "pyxis":
        if not check:
            # A step does not have this from its job.
            cpus = [] if wanted.cpus is None else [f"--cpus-per-task={wanted.cpus}"]
            yield from ["srun", "--ntasks=1", *cpus, *pyxis_options(wanted)]
    elif wanted.runtime is not None and wanted.container is not None:
        yield from [wanted.runtime, "exec", *(["--nv"] if wanted.gpus else [])]
        yield from ["--bind", _mounts(wanted)] if wanted.visible else []
        yield wanted.container


def _mounts(wanted: Wanted) -> str:
    return ",".join(f"{path}:{path}" for path in wanted.visible)
