"""What an exported model is and where it comes from, read without importing torch."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, JsonValue, StringConstraints, ValidationError

from tuner.errors import TunerError

MANIFEST = "manifest.json"

FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}$")]
"""A file's in the export's directory, and of no other: who writes a manifest may not have any file read."""


Base64 = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9+/]+={0,2}$")]

Kind = Literal["classes", "binary", "multilabel", "number"]
"""What a target is: one of several classes, one of two by a single output, any of several, or numbers."""


class TensorDescription(BaseModel):
    """An input or output of a model. `shape` is one row's, without the batch dimension; `name` is None for those by
    their order.

    An input has the least and the greatest value `seen` in the training split. An output has the `kind` of its target,
    and for classes what its `values` are. None of it is in an export of before 0.2.
    """

    name: str | None
    shape: tuple[int, ...]
    dtype: str
    seen: tuple[float, float] | None = None
    kind: Kind | None = None
    values: Literal["logits", "probabilities"] | None = None


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


class Kept(BaseModel):
    """That the model is the one that the trial's function gave to `tuner.keep_model`: nothing was trained again.

    `sha256` is that of all that was kept. It was compared on `rows`, the function's own.
    """

    sha256: str
    rows: int


class OfClass(BaseModel):
    """How a class was recognised on test; None where nothing is divided by."""

    rows: int
    recall: float | None
    precision: float | None
    f1: float | None


class ClassDetails(BaseModel):
    """Where a classifier errs on test: `confusion[wanted][given]` in rows, None for more than 100 classes.

    `calibration_error` is the expected one: the mean distance of confidence and accuracy, over 15 equal bins.
    """

    by_class: dict[str, OfClass]
    confusion: list[list[int]] | None
    calibration_error: float


class TestedRow(BaseModel):
    """A row of the test split, counted from 0: what was `wanted` and `given`, and for a class how sure the model was.

    `image` is the row as a PNG in base64, where an input is a small image; otherwise `values` are its inputs in their
    order, where they are few.
    """

    row: int
    wanted: str | float
    given: str | float
    confidence: float | None = None
    image: Base64 | None = None
    values: list[float] = []


class TestDetails(BaseModel):
    """How sure the figures of the test split are, and where the model errs; each target by its name, "" for the only.

    `intervals` hold 95 % of the figures of as many `resamples` of the rows, drawn with replacement from `seed`; None
    where some are no numbers. `residuals` are what was given less what was wanted, for each output at the quantiles
    0, 5, 25, 50, 75, 95 and 100 %. `wrong` are the rows where the model was surest of another class, or the furthest
    off; `right` are some of those whose class it found, or of all where it gives numbers.
    """

    rows: int
    seed: int
    resamples: dict[str, int]
    intervals: dict[str, tuple[float, float] | None]
    classes: dict[str, ClassDetails] = {}
    residuals: dict[str, list[list[float]]] = {}
    wrong: dict[str, list[TestedRow]] = {}
    right: dict[str, list[TestedRow]] = {}


class FormatCheck(BaseModel):
    """How a format compared with the model on real rows, in batches of 1, 2 and 257.

    `relative_difference` is the largest one's share of the largest value of its output, and at most `tolerance`.
    `latency_ms` is a call's time by its rows, on the processor that the model was exported on. In a `fresh_process`
    nothing of tuner was there, nor of the objective; for the weights it is the model rebuilt by the objective.
    """

    file: FileName
    bytes: int
    difference: float
    relative_difference: float
    tolerance: float
    latency_ms: dict[str, float]
    fresh_process: bool
    opset: int | None = None
    """Of ONNX."""


class EarlierTest(BaseModel):
    """An earlier use of the test split for the study: of which trial, and of which weights."""

    trial: int
    weights_sha256: str


class Confirmed(BaseModel):
    """That the trial was chosen by runs of it and of others on fresh seeds, which `study` has: the best on average.

    `mean` and `std` are of the metric on valid over its `runs`. `alike` are the trials that it cannot be told apart
    from. `gap` is how much better it is than the runner-up on average, and `gap_interval` holds 95 % of its resamples;
    None without another, or with too few runs of one.
    """

    study: str
    runs: int
    mean: float
    std: float | None
    alike: list[int] = []
    gap: float | None = None
    gap_interval: tuple[float, float] | None = None


class Search(BaseModel):
    """What the search took: trials by state, and seconds of devices by what came of them."""

    trials: dict[str, int]
    device_s: dict[str, float]


class Manifest(BaseModel):
    """What an exported model is and where it comes from. A directory without it is no export."""

    model_config = ConfigDict(frozen=True)

    format: Literal[1] = 1
    study: str
    study_id: int
    trial: int
    objective: str
    code_hash: str
    git_revision: str | None = None
    """The commit of the objective's file, with `+` where the file was another; None where git keeps none."""
    options: dict[str, JsonValue]
    params: dict[str, JsonValue]
    metric: str
    direction: Literal["maximize", "minimize"]
    validation: float | None
    confirmed: Confirmed | None = None
    """None for a trial that was not, which was the best of the search or asked for by its number."""
    test: dict[str, float | None]
    """None for a metric that is NaN or infinite, which JSON has not."""
    test_details: TestDetails | None = None
    tested_before: list[EarlierTest] = []
    """Of other weights than these, which makes the figures too good if they were chosen by it."""
    epochs: int
    retraining: Retraining | None = None
    """None in an export of before 0.2: the schedule's epochs were as many as the trial's best one then."""
    kept: Kept | None = None
    """Of a plain function's model, whose `epochs` are the steps that the trial reported; None for one trained again."""
    parameters: int | None = None
    trained_parameters: int | None = None
    """How many numbers the model's weights are, and how many of them were trained; None in an export of before 0.2."""
    seed: int
    """The one of the retraining, which follows from the study's."""
    study_seed: int | None = None
    learning_curve: list[dict[str, JsonValue]] = []
    """The trial's, by epoch: the value, the training loss, the seconds, the learning rates and all metrics."""
    search: Search | None = None
    trained_on: str
    hardware: dict[str, str] = {}
    data: dict[str, JsonValue]
    data_license: str | None = None
    """As the objective names it."""
    inputs: list[TensorDescription]
    outputs: list[TensorDescription] = []
    """Empty without a program, and in an export of before 0.2."""
    class_names: tuple[str, ...] | dict[str, tuple[str, ...]]
    """Of several targets by the target's name, or its place."""
    versions: dict[str, str]
    created_at: str
    files: dict[FileName, str]
    """The sha256 of each file beside the manifest, in hexadecimal."""
    formats: dict[str, FormatCheck] = {}
    """By the names of `tuner export --formats`; empty in an export of before 0.2."""
    missing: dict[str, str] = {}
    """What this export lacks, and why: a file, `test` where it could not be evaluated, or a tensor of the weights."""


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


def is_export(directory: Path) -> bool:
    """Whether there is an export, as its manifest says."""
    try:
        read_manifest(directory)
    except TunerError:
        return False
    return True


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file in hexadecimal. Raises TunerError if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise TunerError(f"cannot read {path}: {error.strerror}; run 'tuner export' again") from error
