"""An exported model: the files of its directory, and reading one back."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError
from torch import nn

from tuner.errors import TunerError
from tuner.formats.program import PROGRAM, load_program
from tuner.formats.weights import WEIGHTS

MANIFEST = "manifest.json"


class TensorDescription(BaseModel):
    """An input or output of a model. `shape` is one row's, without the batch dimension; `name` is None for those by
    their order."""

    name: str | None
    shape: tuple[int, ...]
    dtype: str


class Retraining(BaseModel):
    """How the model was trained again on train + valid.

    `schedule` of the learning rate: `planned`, the study's over `schedule_epochs`, as in the trial; `replayed`, the
    rates that a schedule which follows a metric gave in the trial, as there is no metric now; or `unrecorded`, such a
    schedule of a trial without recorded rates: by the training loss, or constant where it waits for a metric to grow.
    `notes` is what the training told meanwhile.
    """

    schedule: Literal["planned", "replayed", "unrecorded"]
    schedule_epochs: int
    notes: list[str] = []


class Manifest(BaseModel):
    """What an exported model is and where it comes from. Written last: a directory without it is no export."""

    model_config = ConfigDict(frozen=True)

    format: Literal[1] = 1
    study: str
    study_id: int
    trial: int
    objective: str
    code_hash: str
    options: dict[str, JsonValue]
    params: dict[str, JsonValue]
    metric: str
    direction: Literal["maximize", "minimize"]
    validation: float | None
    test: dict[str, float | None]
    """None for a metric that is NaN or infinite, which JSON has not."""
    epochs: int
    retraining: Retraining | None = None
    """None in an export of before 0.2: the schedule's epochs were as many as the trial's best one then."""
    parameters: int | None = None
    trained_parameters: int | None = None
    """How many numbers the model's weights are, and how many of them were trained; None in an export of before 0.2."""
    seed: int
    trained_on: str
    data: dict[str, JsonValue]
    inputs: list[TensorDescription]
    outputs: list[TensorDescription] = []
    """Empty without a program, and in an export of before 0.2."""
    class_names: tuple[str, ...] | dict[str, tuple[str, ...]]
    """Of several targets by the target's name, or its place."""
    versions: dict[str, str]
    created_at: str
    files: dict[str, str]
    """The sha256 of each file beside the manifest, in hexadecimal."""
    missing: dict[str, str] = {}
    """What this export lacks, and why: a file, `test` where it could not be evaluated, or a tensor of the weights."""


class LoadedModel(nn.Module):
    """An exported model in eval mode. It is called as the objective's model is, on batches of any size."""

    def __init__(self, program: nn.Module, manifest: Manifest) -> None:
        super().__init__()
        self.program = program
        self.manifest = manifest
        self.training = False

    def forward(self, *inputs: torch.Tensor, **named: torch.Tensor) -> Any:
        """Return the model's outputs for a batch, one row of outputs a row."""
        return self.program(*inputs, **named)

    def train(self, mode: bool = True) -> LoadedModel:
        """Stay in eval mode. Raises TunerError for `train(True)`: an exported program has no training mode."""
        if mode:
            raise TunerError("an exported model is for inference only; to train, build it with its objective")
        return self


def load_model(path: str | Path, device: str | torch.device = "cpu") -> LoadedModel:
    """Return the exported model in directory `path`, in eval mode, without unpickling anything.

    Each file is checked against the manifest's sha256 first. Raises TunerError if the directory holds no
    export, one that is damaged or incomplete, or one without a program, as its model has none.
    """
    directory = Path(path)
    manifest = read_manifest(directory)
    for name, expected in manifest.files.items():
        found = sha256_of(directory / name)
        if found != expected:
            raise TunerError(
                f"{directory / name} needs the sha256 {expected[:12]} of its manifest, got {found[:12]}:"
                " the export is damaged or incomplete; run 'tuner export' again"
            )
    if PROGRAM not in manifest.files:
        raise TunerError(
            f"{directory} has no {PROGRAM} that could be called ({manifest.missing.get(PROGRAM, 'it was left out')});"
            f" its weights are in {WEIGHTS}, for a model that {manifest.objective} builds from the manifest's params"
        )
    return LoadedModel(load_program(directory / PROGRAM), manifest).to(device).requires_grad_(False)


def read_manifest(directory: Path) -> Manifest:
    """Return the manifest of an export. Raises TunerError if there is none or it cannot be read."""
    path = directory / MANIFEST
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise TunerError(f"no model in {directory}: it has no {MANIFEST}; 'tuner export' writes one") from error
    except OSError as error:
        raise TunerError(f"cannot read {path}: {error.strerror}; run 'tuner export' again") from error
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        reason = ": ".join([*map(str, problem["loc"]), problem["msg"].lower()])
        raise TunerError(f"cannot read {path}: {reason}; run 'tuner export' again") from error


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file in hexadecimal. Raises TunerError if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise TunerError(f"cannot read {path}: {error.strerror}; run 'tuner export' again") from error
