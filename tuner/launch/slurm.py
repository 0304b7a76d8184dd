"""SLURM: an array job whose tasks are workers, each on a node, that come again after a time limit."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Collection, Mapping
from typing import Final

from tuner.errors import TunerError
from tuner.launch.engine import Job, NoEngineError
from tuner.placement import Placement

_ASK_S: Final = 20.0
"""How long an answer of SLURM's may take; its own programs wait for ten seconds before they give up."""
_WAITS: Final = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT")
_RUNS: Final = ("RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT")
_FIELDS: Final = "%i|%T|%R"  # the array's id with its task or tasks, the state, nodes or reason


class Slurm:
    """The cluster whose programs are here."""

    name: Final = "slurm"

    def jobs(self, label: str) -> list[Job]:
        """Return the study's tasks: those that wait in one array together, others by themselves."""
        shown = ask("squeue", "--me", f"--name={label}", "--states=all", "--noheader", f"--format={_FIELDS}")
        return [_job(line) for line in shown.splitlines() if line.strip()]

    def stop(self, label: str) -> list[Job]:
        """Cancel the study's tasks that run or wait."""
        found = [job for job in self.jobs(label) if job.wanted]
        if found:
            ask("scancel", "--quiet", *sorted({job.id.partition("_")[0] for job in found}))
        return found

    def states(self, placements: Collection[Placement]) -> Mapping[Placement, str]:
        """Return the state of each worker's task, while SLURM remembers it: some minutes after its end."""
        if not placements:
            return {}
        jobs = ",".join(sorted({each.job for each in placements}))
        try:
            shown = ask("squeue", f"--jobs={jobs}", "--states=all", "--noheader", "--array", "--format=%i|%T")
        except TunerError as error:
            if "Invalid job id" in str(error):  # all of them are forgotten
                return {}
            raise
        told = dict(line.strip().split("|") for line in shown.splitlines())
        ids = {each: each.job if each.task is None else f"{each.job}_{each.task}" for each in placements}
        return {each: told[task] for each, task in ids.items() if task in told}


def engine() -> Slurm:
    """Return SLURM. Raises NoEngineError if its programs are not here."""
    if missing := [program for program in ("sbatch", "squeue", "scancel", "sinfo") if shutil.which(program) is None]:
        raise NoEngineError(
            f"no SLURM here: {', '.join(missing)} not found; run this where you call sbatch, as on a login node"
        )
    return Slurm()


def ask(*command: str) -> str:
    """Return what one of SLURM's programs prints. Raises TunerError with its own word if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_ASK_S, env=environment(), check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise TunerError(f"{command[0]} does not answer: {error}") from error
    if done.returncode != 0:
        said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise TunerError(f"{command[0]} failed: {said}")
    return done.stdout


def environment() -> dict[str, str]:
    """Return what SLURM's programs, and jobs after them, get of our environment: no password.

    Nor what SLURM told a job that we may be in, which they would take for options of the new one.
    """
    in_job = "SLURM_JOB_ID" in os.environ
    return {
        name: value
        for name, value in os.environ.items()
        if name != "PGPASSWORD" and not (in_job and name.startswith("SLURM") and name != "SLURM_CONF")
    }


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
    """Return how many tasks `0-3,7,9-12%2` are; SLURM shortens a long list by `...`."""
    count = 0
    for part in tasks.partition("%")[0].split(","):
        first, dash, last = part.partition("-")
        if first.isdecimal():
            count += int(last) - int(first) + 1 if dash and last.isdecimal() else 1
    return count
