"""SLURM: an array job whose tasks are workers, each on a node, that come again after a time limit."""

from __future__ import annotations

import math
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from tuner.errors import TunerError, UsageError
from tuner.launch.engine import Job, NoEngineError
from tuner.launch.slurm_script import Runtime, Wanted, body, pyxis_options, script
from tuner.placement import Placement

ASK_S: Final = 20.0
"""How long an answer of SLURM's may take; its own programs wait for ten seconds before they give up."""
FREE_S: Final = 30
"""How long a node is waited for that is to be looked at before workers are sent there."""
CHECK_S: Final = 120
"""How long looking may take there: torch is imported, which file systems of a network are slow at."""

_WAITS: Final = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT")
_RUNS: Final = ("RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT")
_BUSY: Final = ("nodes are busy", "Immediate execution impossible")
# What a new job is not to have of our environment: secrets, as SLURM keeps it where administrators and accounting
# read it, and what the script says itself.
_KEPT_BACK: Final = ("PGPASSWORD", "TUNER_STORAGE", "TUNER_DASHBOARD_TOKEN", "TUNER_IMPORT_URL")


class Slurm:
    """The cluster whose programs are here."""

    name: Final = "slurm"

    def jobs(self, label: str) -> list[Job]:
        """Return the study's tasks: those that wait in one array together, others by themselves."""
        asked = ("--me", f"--name={label}", "--states=all", "--noheader", "--format=%i|%T|%R")
        return sorted(map(_job, ask("squeue", *asked).splitlines()), key=lambda job: job.id)

    def stop(self, label: str) -> list[Job]:
        """Cancel the study's tasks that run or wait."""
        found = [job for job in self.jobs(label) if job.wanted]
        if found:
            ask("scancel", "--quiet", *sorted({job.id.partition("_")[0] for job in found}))
        return found

    def states(self, placements: Collection[Placement]) -> Mapping[Placement, str]:
        """Return the state of each worker's task, while SLURM remembers it: some minutes after its end."""
        jobs = ",".join(sorted({each.job for each in placements if each.job.isdecimal()}))
        if not jobs:
            return {}
        try:
            shown = ask("squeue", f"--jobs={jobs}", "--states=all", "--noheader", "--array", "--format=%i|%T")
        except TunerError as error:
            if "Invalid job id" in str(error):  # all of them are forgotten
                return {}
            raise
        told = dict(line.strip().split("|") for line in shown.splitlines())
        ids = {each: each.job if each.task is None else f"{each.job}_{each.task}" for each in placements}
        return {each: told[task] for each, task in ids.items() if task in told}

    def check_nodes(self, wanted: Wanted) -> None:
        """Raise UsageError if no node of the partition has what a worker is to have, or not for so long."""
        nodes = list(_nodes(wanted.partition))
        if not nodes:
            if wanted.partition is None:  # and no partition is the default: SLURM says what it makes of it
                return
            names = ", ".join(dict.fromkeys(ask("sinfo", "--noheader", "--format=%R").split()))
            raise UsageError(f"SLURM has no partition {wanted.partition!r}; there are: {names or 'none'}")
        where = f"partition {wanted.partition or nodes[0].partition}"
        for option, given, most in (
            ("--gpus-per-node", wanted.gpus, max(node.gpus for node in nodes)),
            ("--cpus-per-node", wanted.cpus or 0, max(node.cpus for node in nodes)),
        ):
            if given > most:
                raise UsageError(f"{option} {given} is more than any node of {where} has: {most or 'none'}")
        limit = max(node.minutes for node in nodes)
        if wanted.minutes is not None and wanted.minutes > limit:
            raise UsageError(f"--time {wanted.minutes}m is more than {where} allows: {limit:g}m")

    def check_from_node(self, wanted: Wanted) -> str | None:
        """Have a node see whether a worker could run there, and return why none was asked, None if one was.

        Raises TunerError with what the node says.
        """
        options = [f"--{name}={value}" for name, value in wanted.resources().items()]
        options += ["--ntasks=1", "--time=5", f"--immediate={FREE_S}", "--job-name=tuner-check", "--quiet"]
        more = [word for text in wanted.extra for word in shlex.split(text)]
        command = ["srun", *options, *more, *pyxis_options(wanted), "bash", "-c", body(wanted, check=True)]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=FREE_S + CHECK_S, env=environment(), check=False
            )
        except subprocess.TimeoutExpired:
            return f"no node has answered within {FREE_S + CHECK_S} s"
        except OSError as error:
            raise NoEngineError(f"no SLURM here: srun: {error.strerror}") from error
        if done.returncode == 0:
            return None
        if any(reason in done.stderr for reason in _BUSY):
            return f"no node was free within {FREE_S} s"
        raise _refused(wanted, done)

    def launch(self, wanted: Wanted, *, check: bool) -> tuple[int, str | None, str]:
        """Submit the workers if they can run, and return their job.

        Before it come how many of the study's run or wait already, and why no node was looked at although `check` says
        so. Raises TunerError, and OSError if the logs have no place.
        """
        self.check_nodes(wanted)
        wanted.logs.mkdir(parents=True, exist_ok=True)  # a job whose log has none fails without a word
        beside = sum(job.wanted for job in self.jobs(wanted.label))
        unchecked = self.check_from_node(wanted) if check else None
        return beside, unchecked, ask("sbatch", "--parsable", given=script(wanted)).strip().partition(";")[0]


def engine() -> Slurm:
    """Return SLURM. Raises NoEngineError if its programs are not here."""
    if missing := [name for name in ("sbatch", "srun", "squeue", "scancel", "sinfo") if shutil.which(name) is None]:
        raise NoEngineError(
            f"no SLURM here: no {', '.join(missing)} on the PATH; run this where you call sbatch, as on a login node"
        )
    return Slurm()


def ask(*command: str, given: str | None = None) -> str:
    """Return what one of SLURM's programs prints, `given` on its stdin. Raises TunerError with its word if it fails."""
    environ = {**environment(), "SLURM_BITSTR_LEN": "0"}  # lists of tasks are not shortened
    try:
        done = subprocess.run(
            command, input=given or "", capture_output=True, text=True, timeout=ASK_S, env=environ, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise TunerError(f"{command[0]} does not answer: {error}") from error
    if done.returncode != 0:
        raise TunerError(f"{command[0]} failed: {_own_word(done.stderr) or f'exit code {done.returncode}'}")
    return done.stdout


def environment() -> dict[str, str]:
    """Return what SLURM's programs, and jobs after them, get of our environment.

    What SLURM told a job that we may be in is left out: its programs would take it for options.
    """
    in_job = "SLURM_JOB_ID" in os.environ
    return {
        name: value
        for name, value in os.environ.items()
        if name not in _KEPT_BACK and not (in_job and name.startswith("SLURM") and name != "SLURM_CONF")
    }


def runtime_of(image: str, *, may_be_elsewhere: bool = False) -> Runtime:
    """Return what runs the image: SLURM itself by NVIDIA's plugin, unless it is a .sif, or Apptainer or Singularity.

    Raises NoEngineError if there is none of them here, unless it `may_be_elsewhere`.
    """
    is_sif = image.endswith(".sif")
    if not is_sif and shutil.which("srun") is not None and "--container-image" in ask("srun", "--help"):
        return "pyxis"
    for name in ("apptainer", "singularity"):
        if shutil.which(name) is not None:
            return name
    if may_be_elsewhere:
        return "apptainer" if is_sif else "pyxis"
    raise NoEngineError(
        f"nothing here runs the image {image}: srun has no --container-image (the plugin pyxis), and apptainer and"
        " singularity are not on the PATH; without --container workers run in a Python that all nodes see"
    )


@dataclass(frozen=True, kw_only=True)
class _Node:
    partition: str
    gpus: int
    cpus: int
    minutes: float


def _nodes(partition: str | None) -> Iterator[_Node]:
    """Yield the nodes of a partition, or of the default one."""
    asked = ["sinfo", "--noheader", "--Node", "--format=%P|%G|%c|%l"]
    for line in ask(*asked, *([] if partition is None else [f"--partition={partition}"])).splitlines():
        name, generic, cpus, limit = line.strip().split("|")
        if partition is not None or name.endswith("*"):
            gpus = sum(int(found) for found in re.findall(r"(?:^|,)gpu(?::[^,:(]+)?:(\d+)", generic))
            yield _Node(partition=name.rstrip("*"), gpus=gpus, cpus=int(cpus.rstrip("+")), minutes=_minutes(limit))


def _minutes(limit: str) -> float:
    """Return a time limit as SLURM writes it, such as 2-00:30:00 or infinite, in minutes."""
    days, _, rest = limit.rpartition("-")
    parts = rest.split(":")
    if not all(part.isdecimal() for part in parts):
        return math.inf
    hours, minutes, _ = (["0"] * (3 - len(parts)) + parts)[-3:]
    return int(days or 0) * 1440 + int(hours) * 60 + int(minutes)


def _refused(wanted: Wanted, done: subprocess.CompletedProcess[str]) -> TunerError:
    """Return what to say of a look at a node that failed: what tuner said there, or the shell, or SLURM."""
    node = done.stdout.partition("\n")[0].strip()
    said = [line.removeprefix("tuner: ") for line in done.stderr.splitlines() if line.startswith("tuner: ")]
    if not node:
        return TunerError(f"SLURM gives no node to look at: {_own_word(done.stderr)}; --no-check goes on without")
    if said:
        return TunerError(f"node {node}: {said[-1]}", done.returncode if done.returncode in range(1, 6) else None)
    if done.returncode == 127:
        where = f"in the image {wanted.container}" if wanted.container else f"in {wanted.programs}"
        return TunerError(
            f"node {node} finds no tuner {where}; install it where all nodes see it, or say how they come to it:"
            " --setup 'source /path/of/venv/bin/activate'"
        )
    return TunerError(f"node {node}: {_own_word(done.stderr) or f'exit code {done.returncode}'}")


def _own_word(stderr: str) -> str:
    """Return what SLURM's programs tell as errors, or else the last line."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    told = [re.sub(r"^(\w+: )(error: |fatal: )?", "", line) for line in lines if re.match(r"s\w+: ", line)]
    return "; ".join(dict.fromkeys(told)) or "".join(lines[-1:])


def _job(line: str) -> Job:
    task, state, where = line.strip().split("|", 2)
    tasks = re.search(r"_\[([^]]*)\]", task)
    count = 1 if tasks is None else _count(tasks[1])
    runs, waits = state in _RUNS, state in _WAITS
    return Job(
        engine=Slurm.name,
        id=task,
        state=state,
        wanted=count if runs or waits else 0,
        running=count if runs else 0,
        detail=where.strip("()"),
    )


def _count(tasks: str) -> int:
    """Return how many tasks `0-3,7,9-12%2` are."""
    count = 0
    for part in tasks.partition("%")[0].split(","):
        first, dash, last = part.partition("-")
        if first.isdecimal():
            count += int(last) - int(first) + 1 if dash and last.isdecimal() else 1
    return count
