"""From a finished study to a model: retrain the best trial, test it once, write it, load it back."""

from __future__ import annotations

import datetime as dt
import io
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from sqlalchemy import Engine
from torch import nn
from torchmetrics import Metric

from storage.coordination import studies
from storage.coordination.studies import TrialRecord
from tuner import training
from tuner.data import Data, Inputs, Rows, Split, join, tensors
from tuner.errors import TunerError
from tuner.files import sync_directory
from tuner.log import Log
from tuner.model.loading import MANIFEST, PROGRAM, WEIGHTS, InputDescription, Manifest, load_program, sha256_of
from tuner.model.output import check_output
from tuner.objective import Objective
from tuner.seeds import derive_seed, seed_everything, set_deterministic
from tuner.slot.attempt import load_data
from tuner.slot.where import with_line
from tuner.study.joining import Study, best_of
from tuner.study.registry import ObjectiveSource, build_objective, is_objective_class
from tuner.training.batches import place_rows
from tuner.training.steps import call
from tuner.versions import versions

CHECKED_ROWS = 256
"""How many validation rows a file that was loaded back is compared with the model on."""


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
) -> Exported:
    """Retrain the study's best trial on train + valid, evaluate it once on test, and write it to `output`.

    Everything is written aside, loaded back, compared with the model and only then moved to `output`, the
    manifest last; an export that was there before stays until then. Raises TunerError if the study has no
    complete trial, its objective cannot be exported or `output` cannot be written.
    """
    best = best_of(engine, study)
    objective = _objective(study, source)
    check_output(output)
    set_deterministic(study.spec.training.deterministic)  # before anything is computed
    data = load_data(objective, data_dir)
    epochs = int(best.user_attrs.get("epoch", study.spec.epochs))  # a notebook's trial does not say
    seed = derive_seed(study.spec.seed, "export", best.number)
    log.event(
        "retraining",
        f"retraining trial {best.number} on train + valid for {epochs} epochs",
        trial=best.number,
    )
    device_ = training.choose_device(device)
    model = _retrain(objective, study, best, data, epochs, seed, device_, log).cpu()  # where files are compared with it
    metrics = objective.build_metrics(data)
    log.event("exporting", f"writing the model to {output}", output=str(output))
    with _aside(output) as directory:
        _write(model, data.valid, directory)
        _verify(model, data.valid, directory)
        weights_sha256 = sha256_of(directory / WEIGHTS)
        test = _test_once(engine, study, best, model.to(device_), data, metrics, weights_sha256, device_, log)
        manifest = Manifest(
            study=study.name,
            study_id=study.study_id,
            trial=best.number,
            objective=study.spec.objective.name,
            code_hash=source.code_hash(),
            options=study.spec.objective.options,
            params=best.params,
            metric=study.spec.metric,
            direction=study.spec.direction,
            validation=_value(best),
            test=test,
            epochs=epochs,
            seed=seed,
            trained_on=str(device_),
            data={
                "fingerprint": data.fingerprint(),
                **{name: len(split) for name, split in data.splits()},
            },
            inputs=_describe(data.train.rows(slice(0, 1)).inputs),
            class_names=data.class_names,
            versions=versions(),
            created_at=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
            files={name: sha256_of(directory / name) for name in (WEIGHTS, PROGRAM)},
        )
        (directory / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n")
        _publish(directory, output)
    return Exported(directory=output, manifest=manifest)


def _objective(study: Study, source: ObjectiveSource) -> Objective:
    kind = source.load()
    if not is_objective_class(kind):
        raise TunerError(
            f"{source.name} is a plain function and has no model to export; write it as a subclass of tuner.Objective"
        )
    return build_objective(kind, study.spec.objective.options, study.spec.seed)


class _Predictor(nn.Module):
    """A model of several outputs as the one that is exported: it gives the objective's prediction."""

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model = model
        self._prediction = objective.prediction

    def forward(self, *args: Any, **named: Any) -> torch.Tensor:
        return self._prediction(self.model(*args, **named))


def _retrain(
    objective: Objective,
    study: Study,
    best: TrialRecord,
    data: Data,
    epochs: int,
    seed: int,
    device: torch.device,
    log: Log,
) -> nn.Module:
    def tell(line: str) -> None:
        log.event("note", line)

    seed_everything(seed)
    try:
        model = objective.build_model(best.params).to(device)
        (train,) = place_rows([join(data.train, data.valid)], device, study.spec.training.data, tell)
        metrics = {name: metric.to(device) for name, metric in objective.build_metrics(data).items()}
        run = training.Run(options=training.Options(**study.spec.training.model_dump()), log=tell)
        objective.fit(model, train, None, best.params, metrics=metrics, epochs=epochs, seed=seed, run=run)
    except Exception as error:
        raise TunerError(f"retraining trial {best.number} failed: {with_line(error, objective)}") from error
    gives_prediction = type(objective).prediction is Objective.prediction
    return (model if gives_prediction else _Predictor(model, objective)).eval()


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
) -> dict[str, float]:
    """Return the test metrics: the recorded ones of these very weights, or else measured now and recorded.

    They are measured on the model's `device`, and in fp32, as the exported model is used.
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
    test_metrics = training.evaluate(model, test, on_device)
    studies.record_export(engine, study.study_id, best.number, weights_sha256, test_metrics)
    return test_metrics


def _write(model: nn.Module, example: Rows, directory: Path) -> None:
    # Both are made in memory: on a full disk torch's own writer ends the process (torch 2.15, 2026-11).
    weights = {name: tensor.detach().clone().contiguous() for name, tensor in _weights(model).items()}
    (directory / WEIGHTS).write_bytes(save(weights))
    rows = example.rows(torch.arange(4) % len(example)).inputs  # one row alone would be taken for a fixed size
    args, kwargs = _arguments(rows)
    batch = torch.export.Dim("batch", min=1)
    shapes: Any = _like(rows, {0: batch})
    if isinstance(model, _Predictor) and not isinstance(rows, dict):
        shapes = (shapes,)  # its arguments are one, named args
    try:
        program = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise TunerError(f"torch.export cannot export this model: {type(error).__name__}: {reason}") from error
    program.example_inputs = None  # they would be pickled
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    (directory / PROGRAM).write_bytes(buffer.getbuffer())


def _verify(model: nn.Module, rows: Rows, directory: Path) -> None:
    """Load each file back and compare it with the model. Raises TunerError on the first difference."""
    weights = load_file(directory / WEIGHTS)
    for name, tensor in _weights(model).items():
        if not torch.equal(weights[name], tensor):
            raise TunerError(f"{WEIGHTS} does not give back the tensor {name!r}: the disk or its driver is at fault")
    inputs = rows.rows(slice(0, CHECKED_ROWS)).inputs
    wanted = training.predict(model, inputs)
    with torch.inference_mode():
        found = call(load_program(directory / PROGRAM), inputs)
    try:
        torch.testing.assert_close(found, wanted)
    except AssertionError as error:
        difference = float((found - wanted).abs().max())
        raise TunerError(
            f"{PROGRAM} needs to give the model's outputs, got a difference of {difference:.3g}:"
            " its forward() does something that torch.export cannot carry"
        ) from error


@contextmanager
def _aside(output: Path) -> Iterator[Path]:
    """Yield a new directory on the file system of `output`, removed afterwards.

    An `output`, and parents of it, that were not there before do not stay if the block fails.
    """
    made = [place for place in (output, *output.parents) if not place.exists()]
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output, prefix=".tuner-") as directory:
            yield Path(directory)
    except OSError as error:
        raise TunerError(
            f"cannot write the model to {output}: {error.strerror or error}; free some space or choose another --output"
        ) from error
    finally:
        if made and not (output / MANIFEST).exists():
            with suppress(OSError):  # somebody else uses it by now
                for place in made:
                    place.rmdir()


def _publish(directory: Path, output: Path) -> None:
    for name in (WEIGHTS, PROGRAM, MANIFEST):
        with (directory / name).open("rb") as file:
            os.fsync(file.fileno())
    for name in (WEIGHTS, PROGRAM, MANIFEST):
        os.replace(directory / name, output / name)
    sync_directory(output)


def _weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights by the names that they have in the objective's own model."""
    return (model.model if isinstance(model, _Predictor) else model).state_dict()


def _arguments(inputs: Inputs) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
    return ((), inputs) if isinstance(inputs, dict) else (tensors(inputs), {})


def _like(inputs: Inputs, shape: Any) -> Any:
    return dict.fromkeys(inputs, shape) if isinstance(inputs, dict) else tuple(shape for _ in tensors(inputs))


def _describe(inputs: Inputs) -> list[InputDescription]:
    names = list(inputs) if isinstance(inputs, dict) else [None] * len(tensors(inputs))
    return [
        InputDescription(name=name, shape=tuple(tensor.shape[1:]), dtype=str(tensor.dtype).removeprefix("torch."))
        for name, tensor in zip(names, tensors(inputs), strict=True)
    ]


def _value(trial: TrialRecord) -> float:
    assert trial.value is not None
    return trial.value
