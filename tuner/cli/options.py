"""The options that define a study, the same for every command that creates one."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, field
from typing import Annotated, Any, get_args

import typer

from tuner.errors import UsageError
from tuner.exits import ExitCode
from tuner.spec import Budget, DataPlace, Precision, TrainingSpec
from tuner.text import printable

_UNITS_S = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}


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
class StudyOptions:
    """What a study is created with. Each field is an option of the command that has such a parameter.

    But for `given`, the names of those that were given.
    """

    given: frozenset[str] = frozenset()
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
            help="median, percentile, hyperband, asha or none, and its settings, as median:n_warmup_steps=5",
            rich_help_panel=STUDY,
        ),
    ] = "median"
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
        bool, typer.Option("--compile", help="Compile models by torch.compile.", rich_help_panel=TRAINING)
    ] = False
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

    def plan(self) -> dict[str, Any]:
        """Return the arguments of `tuner.study.joining.plan`, as far checked as can be before torch is imported."""
        from tuner.slot.shared_checkpoints import checked_place
        from tuner.study.params import MAX_INT, parse_value
        from tuner.study.sampling import check_sampler_name, pruner_spec

        if self.epochs is not None:
            check_positive("--epochs", self.epochs)
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"--seed needs a whole number from 0 to 2^63 - 1, got {self.seed}")
        if self.direction not in (None, "minimize", "maximize"):
            raise UsageError(f"--direction needs minimize or maximize, got {self.direction!r}")
        check_sampler_name(self.sampler)
        pruner_spec(self.pruner, MAX_INT)  # as many epochs as there may be: how many is the objective's to say
        texts = _pairs(self.set_ or [])
        return {
            "options": {name: parse_value(text) for name, text in texts.items()},
            "option_texts": texts,
            "budget": self._budget(),
            "epochs": self.epochs,
            "sampler": self.sampler,
            "pruner": self.pruner,
            "direction": self.direction,
            "seed": self.seed,
            "history": self.from_,
            "training": self._training(),
            "checkpoints": checked_place(self.checkpoints),
            "trial_timeout_s": None if self.trial_timeout is None else seconds("--trial-timeout", self.trial_timeout),
            "watchdog": self.watchdog,
            "checkpoint_every_s": seconds("--checkpoint-every", self.checkpoint_every),
        }

    def given_settings(self) -> frozenset[str]:
        """Return which of `plan`'s settings, or of their fields, were given."""
        return frozenset(_SETTINGS.get(name, name) for name in self.given)

    def _budget(self) -> Budget:
        check_positive("--trials", self.trials)
        if not 0 <= self.max_failures <= MAX_COUNT:
            raise UsageError(f"--max-failures needs a whole number from 0 to {MAX_COUNT}, got {self.max_failures}")
        timeout_s = None if self.timeout is None else seconds("--timeout", self.timeout)
        return Budget(trials=self.trials, timeout_s=timeout_s, max_failures=self.max_failures)

    def _training(self) -> TrainingSpec:
        if self.patience is not None:
            check_positive("--patience", self.patience)
        if self.prefetch is not None:
            check_positive("--prefetch", self.prefetch)
        if self.readers is not None and self.readers < 0:
            raise UsageError(f"--readers needs a whole number from 0, got {self.readers}")
        for option, given, allowed in (
            ("--precision", self.precision, get_args(Precision)),
            ("--data", self.data, get_args(DataPlace)),
        ):
            if given not in allowed:
                raise UsageError(f"{option} needs {', '.join(allowed[:-1])} or {allowed[-1]}, got {given!r}")
        return TrainingSpec.model_validate(
            {
                "precision": self.precision,
                "deterministic": self.deterministic,
                "compile": self.compile_,
                "cuda_graphs": self.cuda_graphs,
                "patience": self.patience,
                "data": self.data,
                "readers": self.readers,
                "prefetch": self.prefetch,
                "train_metrics": self.train_metrics,
            }
        )


@dataclass(frozen=True, kw_only=True)
class SpecOptions(StudyOptions):
    """What a study that is there gets: its name is given otherwise, and its trials count towards its budget."""

    study: str | None = field(init=False, default=None)
    from_: str | None = field(init=False, default=None)
    trials: int = field(init=False, default=1)


_SETTINGS = {
    "timeout": "timeout_s",
    "compile_": "compile",
    "checkpoint_every": "checkpoint_every_s",
    "from_": "history",
}
"""What an option is called in a spec, where its name is another."""
MAX_COUNT = 2**31 - 1
"""PostgreSQL's largest number of a trial or a step."""
MAX_DAYS = 10_000


def check_positive(option: str, value: int) -> None:
    """Raise UsageError, naming the option, if its value is not above 0, or more than the database counts to."""
    if not 0 < value <= MAX_COUNT:
        limit = "" if value < 1 else f" and at most {MAX_COUNT}"
        raise UsageError(f"{option} needs a whole number above 0{limit}, got {value}")


def _pairs(texts: list[str]) -> dict[str, str]:
    pairs = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise UsageError(f"--set needs KEY=VALUE, got {text!r}")
        pairs[key] = value
    return pairs


def seconds(option: str, text: str) -> float:
    """Return a time such as 90s, 15m or 2h in seconds. Raises UsageError, naming the option."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", text)
    if match is None or float(match[1]) == 0:
        raise UsageError(f"{option} needs a time above 0 such as 90s, 15m or 2h, got {text!r}")
    found = float(match[1]) * _UNITS_S[match[2]]
    if found > MAX_DAYS * _UNITS_S["d"]:
        raise UsageError(f"{option} needs a time of at most {MAX_DAYS} days, got {text!r}")
    return found


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
