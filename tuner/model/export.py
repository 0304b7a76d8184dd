"""From a finished study to a model: retrain the best trial, test it once, write it, load it back."""

from __future__ import annotations

import datetime as dt
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from sqlalchemy import Engine
from torch import nn

from storage.coordination import studies
from storage.coordination.records import TrialRecord
from storage.trials.curves import curves
from tuner import cores, training
from tuner.caches import keep_compiled_apart
from tuner.data import ClassNames, Data, Split
from tuner.errors import FormatError, UsageError
from tuner.formats.names import DEFAULT, FILES, require
from tuner.formats.weights import WEIGHTS
from tuner.log import Log
from tuner.model.card import card
from tuner.model.confirmed import confirmed_by
from tuner.model.describing import with_kinds, with_ranges
from tuner.model.directory import CARD, replacing
from tuner.model.keeping import export_kept
from tuner.model.manifest import MANIFEST, EarlierTest, Manifest, TestDetails, sha256_of
from tuner.model.output import check_output
from tuner.model.provenance import as_json, finite, git_revision, hardware, search_of
from tuner.model.retraining import retrain
from tuner.model.testing import details_of_test
from tuner.model.writing import Written, described, write_formats
from tuner.objective import Objective
from tuner.seeds import derive_seed, set_deterministic
from tuner.slot.attempt import load_data
from tuner.slot.preflight import exported_form
from tuner.slot.where import with_line
from tuner.study.confirming import choose
from tuner.study.joining import Study
from tuner.study.registry import ObjectiveSource, build_objective, is_objective_class
from tuner.training.batches import place_rows
from tuner.versions import versions


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What an export gave: the directory and its manifest. `trial` is the one that was trained again."""

    directory: Path
    manifest: Manifest
    trial: TrialRecord


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
    trial: int | None = None,
    epochs: int | None = None,
    formats: Sequence[str] = DEFAULT,
    in_fresh_process: bool = False,
) -> Exported:
    """Retrain the study's best trial, or the `trial` of that number, on train + valid, evaluate it once on test, and
    write it to `output`.

    A plain function's is not trained again, but is the one that the trial kept (`tuner.keep_model`), and has no test.

    It is the confirmed one, where there is one, or that of the number `trial`, where one is given.

    It is trained until the epoch of its best value, with `full_schedule` for all of the study's, or for so many
    `epochs`. Each of the `formats` is compared with the model as a process loads it: this one, or a fresh one.

    Everything is written aside, loaded back, compared with the model and only then takes the place of `output` as a
    whole; an export that was there before stays until then. What this model cannot have - a program, a figure
    of the test split - is left out, and the manifest says why. Raises TunerError if the study has no complete trial,
    its best cannot be trained again or `output` cannot be written.
    """
    chosen = choose(engine, study, trial)
    best = chosen.trial
    require(formats)
    check_output(output)
    kind = source.load()
    if not is_objective_class(kind):
        if full_schedule or epochs is not None:
            raise UsageError(
                f"--epochs, --full-schedule: {source.name} is a plain function, whose model is as it kept it"
            )
        kept = export_kept(
            engine, study, source, chosen, output, data_dir, log, formats, in_fresh_process=in_fresh_process
        )
        return Exported(directory=output, manifest=kept, trial=best)
    objective = build_objective(kind, study.spec.objective.options, study.spec.seed)
    if chosen.note is not None:
        log.event("chosen", chosen.note, trial=best.number)
    keep_compiled_apart()
    if cores.named() is None:  # torch knows of no container's limit
        torch.set_num_threads(min(torch.get_num_threads(), cores.count()))
    set_deterministic(study.spec.training.deterministic)  # before anything is computed
    data = load_data(objective, data_dir, study.spec.training)
    seed = derive_seed(study.spec.seed, "export", best.number)
    device_ = training.choose_device(device)
    with engine.connect() as conn:
        curve = curves(conn, study.study_id, [best.number]).get(best.number, [])
    trained = retrain(
        objective,
        study,
        best,
        curve,
        data,
        full_schedule=full_schedule,
        epochs=epochs,
        seed=seed,
        device=device_,
        log=log,
    )
    model = trained.model.cpu()  # where files are compared with it
    log.event("exporting", f"writing the model to {output}", output=str(output))
    with replacing(output) as directory:
        written = write_formats(
            model, objective, best.params, data.valid, directory, formats, in_fresh_process=in_fresh_process
        )
        missing = written.missing
        shown = exported_form(model, objective)
        outputs = with_kinds(written.outputs, shown, data, objective)
        sha256 = sha256_of(directory / WEIGHTS)
        tested = _Tested()
        shown = shown.to(device_)
        try:
            tested = _measured(engine, study, best, shown, data, objective, sha256, device_, log)
        except FormatError as error:
            missing["test"] = str(error)
        if tested.without_details is not None:
            missing["test_details"] = tested.without_details
        for name, reason in missing.items():
            others = f"; it has {_listed(written)}" if name in FILES.values() else ""
            log.event("missing", f"the export has no {name}: {reason}{others}", name=name)
        manifest = Manifest(
            study=study.name,
            study_id=study.study_id,
            trial=best.number,
            objective=study.spec.objective.name,
            code_hash=source.code_hash(),
            git_revision=git_revision(source.file),
            options=study.spec.objective.options,
            params=as_json(best.params),
            metric=study.spec.metric,
            direction=study.spec.direction,
            validation=finite(best.value),
            confirmed=confirmed_by(chosen.confirmation),
            test=tested.metrics,
            test_details=tested.details,
            tested_before=tested.before,
            epochs=trained.epochs,
            retraining=trained.how,
            parameters=trained.counts["parameters"],
            trained_parameters=trained.counts["trained_parameters"],
            seed=seed,
            study_seed=study.spec.seed,
            learning_curve=as_json([asdict(point) for point in curve]),
            search=search_of(engine, study),
            trained_on=str(device_),
            hardware=hardware(device_),
            data_license=objective.data_license,
            data={
                "fingerprint": data.fingerprint(),
                **{name: len(split) for name, split in data.splits()},
            },
            inputs=with_ranges(described(data.train.rows(slice(0, 1)).inputs), data.train),
            outputs=outputs,
            class_names=_class_names(data.class_names),
            versions=versions(),
            created_at=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
            files={name: sha256_of(directory / name) for name in FILES.values() if (directory / name).exists()},
            formats=written.formats,
            missing=missing,
        )
        (directory / CARD).write_text(card(manifest), encoding="utf-8")
        (directory / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return Exported(directory=output, manifest=manifest, trial=best)


@dataclass(frozen=True, kw_only=True)
class _Tested:
    """What came of the test split; `without_details` says why there are none of these."""

    metrics: dict[str, float | None] = field(default_factory=dict)
    details: TestDetails | None = None
    without_details: str | None = None
    before: list[EarlierTest] = field(default_factory=list)


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
) -> _Tested:
    """Return the test metrics: the recorded ones of these very weights, or else measured now and recorded.

    They are measured on the model's `device`, and in fp32, as the exported model is used. None stands for one that is
    NaN or infinite. Raises FormatError if the split cannot be evaluated.
    """
    earlier = studies.list_exports(engine, study.study_id)
    place = next((number for number, (_, its, _) in enumerate(earlier) if its == weights_sha256), None)
    recorded = None if place is None else earlier[place][2]
    before = [EarlierTest(trial=trial, weights_sha256=its) for trial, its, _ in earlier[:place]]
    if before and recorded is None:
        log.event(
            "test_again",
            f"the test split was evaluated {len(before)} times before for this study, with other weights:"
            " choosing between them by it would make its figure too good",
        )
    with _of_test(objective):
        metrics = {name: metric.to(device) for name, metric in objective.build_metrics(data).items()}
        test = data.test
        if isinstance(test, Split):  # samples are streamed
            (test,) = place_rows([test], device, "auto", lambda _: None)
        found = recorded
        if found is None:
            found = {name: finite(value) for name, value in training.evaluate(model, test, metrics).items()}
    if recorded is None:
        studies.record_export(engine, study.study_id, best.number, weights_sha256, found)
    if not isinstance(test, Split):
        return _Tested(metrics=found, before=before, without_details="the split is streamed")
    try:
        with _of_test(objective), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as of a resample without a class
            names, seed = _class_names(data.class_names), derive_seed(study.spec.seed, "resamples", best.number)
            details = details_of_test(model, test, data, metrics, names, seed, show_rows=objective.show_rows)
    except FormatError as error:
        return _Tested(metrics=found, before=before, without_details=str(error))
    why = "there are too many predictions to keep" if details is None else None
    return _Tested(metrics=found, details=details, before=before, without_details=why)


@contextmanager
def _of_test(objective: Objective) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise FormatError(f"the test split could not be evaluated: {with_line(error, objective)}") from error


def _listed(written: Written) -> str:
    return ", ".join(dict.fromkeys([WEIGHTS, *(its.file for its in written.formats.values())]))


def _class_names(names: ClassNames) -> tuple[str, ...] | dict[str, tuple[str, ...]]:
    if names and not isinstance(names, Mapping) and not isinstance(names[0], str):
        names = {str(place): tuple(its) for place, its in enumerate(names)}
    if isinstance(names, Mapping):
        return {str(target): tuple(its) for target, its in names.items()}
    return tuple(map(str, names))
