"""A study as it is wanted, in the words of its options, checked and made the arguments of a spec."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, get_args

from tuner.errors import UsageError
from tuner.spec import Budget, CompileBackend, CompileMode, DataPlace, Precision, TrainingSpec

_UNITS_S = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True, kw_only=True)
class StudyPlan:
    """What a study is created with. `given` are the names of those that were given."""

    given: frozenset[str] = frozenset()
    study: str | None = None
    set_: list[str] | None = None
    sampler: str = "tpe"
    pruner: str = "median"
    audit: float = 0.0
    direction: str | None = None
    seed: int = 0
    from_: str | None = None
    trials: int = 30
    timeout: str | None = None
    max_failures: int = 10
    trial_timeout: str | None = None
    watchdog: bool | None = None
    epochs: int | None = None
    patience: int | None = None
    precision: str = "fp32"
    compile_: bool = False
    compile_mode: str = "default"
    compile_backend: str = "inductor"
    cuda_graphs: bool = False
    deterministic: bool = False
    train_metrics: bool = False
    data: str = "auto"
    readers: int | None = None
    prefetch: int | None = None
    checkpoints: str = "database"
    checkpoint_every: str = "30s"

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
        if not 0 <= self.audit <= 1:
            raise UsageError(f"--audit needs a part from 0 to 1, such as 0.02, got {self.audit:g}")
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
            "audit": self.audit,
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
            ("--compile-mode", self.compile_mode, get_args(CompileMode)),
            ("--compile-backend", self.compile_backend, get_args(CompileBackend)),
        ):
            if given not in allowed:
                raise UsageError(f"{option} needs {', '.join(allowed[:-1])} or {allowed[-1]}, got {given!r}")
        if not self.compile_ and (self.compile_mode != "default" or self.compile_backend != "inductor"):
            raise UsageError("--compile-mode and --compile-backend say how to compile: give --compile as well")
        if self.compile_mode != "default" and self.compile_backend != "inductor":
            raise UsageError(f"--compile-mode {self.compile_mode} is inductor's, got --compile-backend aot_eager")
        return TrainingSpec.model_validate(
            {
                "precision": self.precision,
                "deterministic": self.deterministic,
                "compile": self.compile_,
                "compile_mode": self.compile_mode,
                "compile_backend": self.compile_backend,
                "cuda_graphs": self.cuda_graphs,
                "patience": self.patience,
                "data": self.data,
                "readers": self.readers,
                "prefetch": self.prefetch,
                "train_metrics": self.train_metrics,
            }
        )


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
