"""Who placed a process on its machine: an engine such as SLURM, as the process's environment tells."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

VARIABLES = {
    "engine": "TUNER_PLACED_BY",
    "job": "TUNER_PLACED_JOB",
    "task": "TUNER_PLACED_TASK",
    "node": "TUNER_PLACED_NODE",
}
"""What `tuner launch` sets for engines that have no such variables of their own."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """The job of an engine, and the one of its tasks, that a process is; `node` is the engine's name of the machine."""

    engine: str
    job: str
    task: str | None = None
    node: str | None = None

    @property
    def shown(self) -> str:
        """The placement for people, as `slurm 17_0 on n1`."""
        task = "" if self.task is None else f"_{self.task}"
        return f"{self.engine} {self.job}{task}" + ("" if self.node is None else f" on {self.node}")

    def fields(self) -> dict[str, str | None]:
        """Return it as it is stored with a worker; `of_fields` reads it again."""
        return asdict(self)

    @classmethod
    def of_fields(cls, fields: Mapping[str, str | None]) -> Placement:
        """Return what `fields` gave, of whichever version."""
        job = fields.get("job") or "?"
        return cls(engine=fields.get("engine") or "?", job=job, task=fields.get("task"), node=fields.get("node"))


def placement(environ: Mapping[str, str]) -> Placement | None:
    """Return who placed the process that has this environment, None if somebody started it by hand.

    What `tuner launch` says comes first: a cluster of Ray may itself run in a job of SLURM.
    """
    told = {name: environ.get(variable) or None for name, variable in VARIABLES.items()}
    if told["engine"] is not None:
        return Placement.of_fields(told)
    # The node is told to what SLURM started, and not to the shell of an allocation on another machine.
    job, node = environ.get("SLURM_JOB_ID"), environ.get("SLURMD_NODENAME")
    if not job or not node:
        return None
    array, task = environ.get("SLURM_ARRAY_JOB_ID"), environ.get("SLURM_ARRAY_TASK_ID")
    return Placement(engine="slurm", job=array or job, task=(task or None) if array else None, node=node)
