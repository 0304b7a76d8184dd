"""From a finished study to a model: retrain the best trial, test it once, write it, load it back."""

from __future__ import annotations

import datetime as dt
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError
from torch import nn
from torchmetrics import Metric

from storage.coordination import studies
from storage.coordination.records import TrialRecord
from storage.database.errors import StorageError
from storage.trials.curves import curves
from tuner import training
from tuner.data import ClassNames, Data, Rows, Split, Tensors, tensors
from tuner.errors import FormatError, TunerError
from tuner.formats.program import PROGRAM, program_file
from tuner.formats.weights import WEIGHTS, differing, weights_file
from tuner.log import Log
from tuner.model.directory import replacing
from tuner.model.manifest import MANIFEST, Manifest, TensorDescription, sha256_of
from tuner.model.output import check_output
from tuner.model.retraining import retrain
from tuner.objective import Objective
from tuner.seeds import derive_seed, set_deterministic
from tuner.slot.attempt import load_data
from tuner.slot.preflight import exported_form
from tuner.slot.where import with_line
from tuner.study.joining import Study, best_of
from tuner.study.registry import ObjectiveSource, build_objective, is_objective_class
from tuner.training.batches import place_rows
from tuner.versions import versions


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What an export gave: the directory and its manifest."""

    directory: Path
    manifest: Manifest


def export_study(
    engine: Engine,
    study: Study,
    source: ObjectiveSource,
    *,
    output: Path,
    data_dir: Path,
    device: str | None,
    log: Log,
    full_schedule: bool = False,
) -> Exported:
    """Retrain the study's best trial on train + valid, evaluate it once on test, and write it to `output`.

    It is trained until the epoch of its best value, or with `full_schedule` for all of the study's.

    Everything is written aside, loaded back, compared with the model and only then takes the place of `output` as a
    whole; an export that was there before stays until then. What this model cannot have - a program, a figure
    of the test split - is left out, and the manifest says why. Raises TunerError if the study has no complete trial,
    its best cannot be trained again or `output` cannot be written.
    """
    best = best_of(engine, study)
    objective = _objective(study, source)
    check_output(output)
    set_deterministic(study.spec.training.deterministic)  # before anything is computed
    data = load_data(objective, data_dir, study.spec.training)
    seed = derive_seed(study.spec.seed, "export", best.number)
    device_ = training.choose_device(device)
    with engine.connect() as conn:
        curve = curves(conn, study.study_id, [best.number]).get(best.number, [])
    trained = retrain(
        objective, study, best, curve, data, full_schedule=full_schedule, seed=seed, device=device_, log=log
    )
    model = trained.model.cpu()  # where files are compared with it
    log.event("exporting", f"writing the model to {output}", output=str(output))
    with replacing(output) as directory:
        missing: dict[str, str] = {}
        _write_weights(model, directory, missing)
        shown = exported_form(model, objective)
        outputs = _write_program(shown, data.valid, directory, missing)
        sha256 = sha256_of(directory / WEIGHTS)
        test: dict[str, float | None] = {}
        try:
            test = _measured(engine, study, best, shown.to(device_), data, objective, sha256, device_, log)
        except FormatError as error:
            missing["test"] = str(error)
        for name, reason in missing.items():
            log.event("missing", f"the export has no {name}: {reason}", name=name)
        manifest = Manifest(
            study=study.name,
            study_id=study.study_id,
            trial=best.number,
            objective=study.spec.objective.name,
            code_hash=source.code_hash(),
            options=study.spec.objective.options,
            params=_as_json(best.params),
            metric=study.spec.metric,
            direction=study.spec.direction,
            validation=_finite(best.value),
            test=test,
            epochs=trained.epochs,
            retraining=trained.how,
            parameters=trained.counts["parameters"],
            trained_parameters=trained.counts["trained_parameters"],
            seed=seed,
            trained_on=str(device_),
            data={
                "fingerprint": data.fingerprint(),
                **{name: len(split) for name, split in data.splits()},
            },
            inputs=_describe(data.train.rows(slice(0, 1)).inputs),
            outputs=outputs,
            class_names=_class_names(data.class_names),
            versions=versions(),
            created_at=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
            files={name: sha256_of(directory / name) for name in (WEIGHTS, PROGRAM) if (directory / name).exists()},
            missing=missing,
        )
        (directory / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n")
    return Exported(directory=output, manifest=manifest)


def _objective(study: Study, source: ObjectiveSource) -> Objective:
    kind = source.load()
    if not is_objective_class(kind):
        raise TunerError(
            f"{source.name} is a plain function and has no model to export; write it as a subclass of tuner.Objective"
        )
    return build_objective(kind, study.spec.objective.options, study.spec.seed)


def _measured(
    engine: Engine,
    study: Study,
    best: TrialRecord,
    model: nn.Module,
    data: Data,
    objective: Objective,
    weights_sha256: str,
    device: torch.device,
    log: Log,
) -> dict[str, float | None]:
    """Return the test metrics as `_test_once` does. Raises FormatError if the split cannot be evaluated."""
    try:
        metrics = objective.build_metrics(data)
        test_metrics = _test_once(engine, study, best, model, data, metrics, weights_sha256, device, log)
    except (StorageError, SQLAlchemyError):
        raise
    except Exception as error:
        raise FormatError(f"the test split could not be evaluated: {with_line(error, objective)}") from error
    return test_metrics


def _test_once(
    engine: Engine,
    study: Study,
    best: TrialRecord,
    model: nn.Module,
    data: Data,
    metrics: dict[str, Metric],
    weights_sha256: str,
    device: torch.device,
    log: Log,
) -> dict[str, float | None]:
    """Return the test metrics: the recorded ones of these very weights, or else measured now and recorded.

    They are measured on the model's `device`, and in fp32, as the exported model is used. None stands for one that is
    NaN or infinite.
    """
    earlier = studies.list_exports(engine, study.study_id)
    for _, sha256, test_metrics in earlier:
        if sha256 == weights_sha256:
            return test_metrics
    if earlier:
        log.event(
            "test_again",
            f"the test split was evaluated {len(earlier)} times before for this study, with other weights:"
            " choosing between them by it would make its figure too good",
        )
    test = data.test
    if isinstance(test, Split):  # samples are streamed
        (test,) = place_rows([test], device, "auto", lambda _: None)
    on_device = {name: metric.to(device) for name, metric in metrics.items()}
    test_metrics = {name: _finite(value) for name, value in training.evaluate(model, test, on_device).items()}
    studies.record_export(engine, study.study_id, best.number, weights_sha256, test_metrics)
    return test_metrics


def _write_weights(model: nn.Module, directory: Path, missing: dict[str, str]) -> None:
    """Write the weights and read them back. Raises TunerError if the disk does not give them back."""
    weights, left_out = weights_file(model)
    missing |= {f"{WEIGHTS}: {name}": reason for name, reason in left_out.items()}
    (directory / WEIGHTS).write_bytes(weights)
    if (name := differing((directory / WEIGHTS).read_bytes(), model)) is not None:
        raise TunerError(f"{WEIGHTS} does not give back the tensor {name!r}: the disk or its driver is at fault")


def _write_program(
    model: nn.Module, example: Rows, directory: Path, missing: dict[str, str]
) -> list[TensorDescription]:
    """Write the program, if the model has one, and return what it gives."""
    try:
        (directory / PROGRAM).write_bytes(program_file(model, example))
    except FormatError as error:
        missing[PROGRAM] = str(error)
        return []
    return _describe(training.predict(model, example.rows(slice(0, 2)).inputs))


def _class_names(names: ClassNames) -> tuple[str, ...] | dict[str, tuple[str, ...]]:
    if names and not isinstance(names, Mapping) and not isinstance(names[0], str):
        names = {str(place): tuple(its) for place, its in enumerate(names)}
    if isinstance(names, Mapping):
        return {str(target): tuple(its) for target, its in names.items()}
    return tuple(map(str, names))


def _describe(inputs: Tensors) -> list[TensorDescription]:
    names = list(inputs) if isinstance(inputs, dict) else [None] * len(tensors(inputs))
    return [
        TensorDescription(name=name, shape=tuple(tensor.shape[1:]), dtype=str(tensor.dtype).removeprefix("torch."))
        for name, tensor in zip(names, tensors(inputs), strict=True)
    ]


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _as_json(params: dict[str, Any]) -> dict[str, Any]:
    """Return params as JSON holds them: choices may be of any kind."""
    found: dict[str, Any] = json.loads(json.dumps(params, default=str))
    return found
