"""The options that define a study, the same for every command that creates one."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Annotated

import typer

from tuner.api.planning import MAX_COUNT, StudyPlan, check_positive, seconds
from tuner.errors import UsageError
from tuner.exits import ExitCode
from tuner.text import printable

__all__ = ["MAX_COUNT", "ObjectiveName", "SpecOptions", "StudyOptions", "ask_first", "check_positive", "seconds"]

# The panels of options in the help of `run`, `create` and `worker`.
STUDY, BUDGET, TRAINING, DATA = "Study", "Budget", "Training", "Data"
WORKERS, LIMITS, RESULT = "Workers", "Limits", "Result"

ObjectiveName = Annotated[
    str,
    typer.Argument(
        metavar="OBJECTIVE", help="Name of an installed objective, path/to/file.py:NAME or package.module:NAME."
    ),
]


@dataclass(frozen=True, kw_only=True)
class StudyOptions(StudyPlan):
    """What a study is created with: each field is an option of the command that has such a parameter."""

    study: Annotated[
        str | None,
        typer.Option("--study", help="Name of the study (default: the objective's).", rich_help_panel=STUDY),
    ] = None
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Set an option of the objective; may be repeated.",
            rich_help_panel=STUDY,
        ),
    ] = None
    sampler: Annotated[
        str,
        typer.Option(
            metavar="NAME[:KEY=VALUE,...]",
            help="tpe, random, gp, cmaes, qmc or grid, and its settings.",
            rich_help_panel=STUDY,
        ),
    ] = "tpe"
    pruner: Annotated[
        str,
        typer.Option(
            metavar="NAME[:KEY=VALUE,...]",
            help="median, percentile, rungs, hyperband, asha or none, and its settings, as rungs:eta=4",
            rich_help_panel=STUDY,
        ),
    ] = "median"
    audit: Annotated[
        float,
        typer.Option(
            metavar="PART",
            help="Of the trials to be pruned, run this part to their end, to see how often that is wrong: 0.02.",
            rich_help_panel=STUDY,
        ),
    ] = 0.0
    direction: Annotated[
        str | None,
        typer.Option(
            metavar="minimize|maximize", help="For a plain function (default: minimize).", rich_help_panel=STUDY
        ),
    ] = None
    seed: Annotated[
        int, typer.Option(help="Everything random in the study follows from it.", rich_help_panel=STUDY)
    ] = 0
    from_: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="STUDY",
            help="A study whose finished trials the sampler learns from as well.",
            rich_help_panel=STUDY,
        ),
    ] = None
    trials: Annotated[int, typer.Option(help="Trials that have to complete or be pruned.", rich_help_panel=BUDGET)] = 30
    timeout: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="Start no trial later than this after the study's creation: 90s, 15m, 2h.",
            rich_help_panel=BUDGET,
        ),
    ] = None
    max_failures: Annotated[
        int, typer.Option(help="Failed trials that do not end the study.", rich_help_panel=BUDGET)
    ] = 10
    trial_timeout: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="Kill a trial that takes longer, which fails (default: it may take as long as it likes).",
            rich_help_panel=BUDGET,
        ),
    ] = None
    watchdog: Annotated[
        bool | None,
        typer.Option(
            "--watchdog/--no-watchdog",
            help="Kill a trial that tells nothing for 10 times the slowest epoch so far, at least a minute, and run it"
            " again (default: where batches are told of, which plain functions do not).",
            rich_help_panel=BUDGET,
        ),
    ] = None
    epochs: Annotated[
        int | None, typer.Option(help="Epochs of a trial (default: the objective's).", rich_help_panel=BUDGET)
    ] = None
    patience: Annotated[
        int | None,
        typer.Option(help="End a trial so many epochs after its best one (default: never).", rich_help_panel=BUDGET),
    ] = None
    precision: Annotated[
        str,
        typer.Option(
            metavar="fp32|tf32|bf16|fp16",
            help="What models compute in; the weights stay in fp32.",
            rich_help_panel=TRAINING,
        ),
    ] = "fp32"
    compile_: Annotated[
        bool,
        typer.Option(
            "--compile", help="Compile the training step by torch.compile, after an epoch.", rich_help_panel=TRAINING
        ),
    ] = False
    compile_mode: Annotated[
        str,
        typer.Option(
            metavar="default|max-autotune",
            help="How long to search for the fastest code.",
            rich_help_panel=TRAINING,
        ),
    ] = "default"
    compile_backend: Annotated[
        str,
        typer.Option(
            metavar="inductor|aot_eager",
            help="What compiles: aot_eager generates no code, to find what fails.",
            rich_help_panel=TRAINING,
        ),
    ] = "inductor"
    cuda_graphs: Annotated[
        bool,
        typer.Option("--cuda-graphs", help="Launch each training step as one CUDA graph.", rich_help_panel=TRAINING),
    ] = False
    deterministic: Annotated[
        bool,
        typer.Option(
            "--deterministic",
            help="Use only algorithms that give the same result each time.",
            rich_help_panel=TRAINING,
        ),
    ] = False
    train_metrics: Annotated[
        bool,
        typer.Option(
            "--train-metrics",
            help="Evaluate the training split too, after each epoch, for the learning curves.",
            rich_help_panel=TRAINING,
        ),
    ] = False
    data: Annotated[
        str,
        typer.Option(
            metavar="auto|resident|stream",
            help="Keep data on the device, or read it while training (auto: by its size).",
            rich_help_panel=DATA,
        ),
    ] = "auto"
    readers: Annotated[
        int | None,
        typer.Option(
            help="Processes that read samples in each slot, 0 for none (default: as many as it has cores, up to 8).",
            rich_help_panel=DATA,
        ),
    ] = None
    prefetch: Annotated[
        int | None, typer.Option(help="Batches that each of them reads ahead (default: 4).", rich_help_panel=DATA)
    ] = None
    checkpoints: Annotated[
        str,
        typer.Option(
            metavar="database|local|URL",
            help="Where other machines find a trial's checkpoint: in the database up to 64 MB, or in a folder or"
            " bucket of this study database's own: file:///mnt/share, s3://bucket/folder",
            rich_help_panel=DATA,
        ),
    ] = "database"
    checkpoint_every: Annotated[
        str,
        typer.Option(metavar="TIME", help="Save a trial's state at most this often: 30s, 5m.", rich_help_panel=DATA),
    ] = "30s"


@dataclass(frozen=True, kw_only=True)
class SpecOptions(StudyOptions):
    """What a study that is there gets: its name is given otherwise, and its trials count towards its budget."""

    study: str | None = field(init=False, default=None)
    from_: str | None = field(init=False, default=None)
    trials: int = field(init=False, default=1)


def ask_first(what: str, *, yes: bool) -> None:
    """Ask on a terminal before what cannot be taken back, and end with 1 if the answer is no.

    Raises UsageError off a terminal unless `--yes` said it.
    """
    if yes:
        return
    if not (sys.stdin is not None and sys.stdin.isatty()):
        raise UsageError(printable(f"{what} if you pass --yes"))
    if not typer.confirm(printable(f"{what}?"), err=True):
        raise typer.Exit(ExitCode.FAILED)
