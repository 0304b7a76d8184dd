"""From a study of a plain function to a model: what its best trial gave to keep, written, compared and loaded back."""

from __future__ import annotations

import datetime as dt
import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from sqlalchemy import Engine

from storage.database.sessions import Sessions
from storage.trials.curves import curves
from tuner.data import Split, tensors
from tuner.errors import TunerError
from tuner.formats.names import FILES
from tuner.log import Log
from tuner.model.card import card
from tuner.model.confirmed import confirmed_by
from tuner.model.describing import with_classes
from tuner.model.directory import CARD, replacing
from tuner.model.manifest import MANIFEST, Kept, Manifest, sha256_of
from tuner.model.provenance import as_json, finite, git_revision, search_of
from tuner.model.writing import described, write_kept
from tuner.slot.kept_model import unpacked
from tuner.slot.kept_models import KeptModels
from tuner.slot.shared_checkpoints import LOCAL
from tuner.study.confirming import Choice
from tuner.study.joining import Study
from tuner.study.registry import ObjectiveSource
from tuner.versions import versions


def has_kept(engine: Engine, study: Study, data_dir: Path) -> bool:
    """Whether any complete trial of the study kept its model."""
    return KeptModels(study, data_dir, Sessions(engine)).best() is not None


def export_kept(
    engine: Engine,
    study: Study,
    source: ObjectiveSource,
    chosen: Choice,
    output: Path,
    data_dir: Path,
    log: Log,
    formats: Sequence[str],
    *,
    in_fresh_process: bool,
) -> Manifest:
    """Write the model that the chosen trial gave to `tuner.keep_model` to `output`, and return its manifest.

    Nothing is trained or evaluated: its figure is what the function returned. Raises TunerError if the trial kept none.
    """
    best = chosen.trial
    data = _kept(engine, study, data_dir, best.number)
    kept = unpacked(data)
    if chosen.note is not None:
        log.event("chosen", chosen.note, trial=best.number)
    log.event("exporting", f"writing the model that trial {best.number} kept to {output}", output=str(output))
    with engine.connect() as conn:
        curve = curves(conn, study.study_id, [best.number]).get(best.number, [])
    rows = Split(kept.inputs, torch.zeros(len(tensors(kept.inputs)[0])))
    with replacing(output) as directory:
        written = write_kept(kept.weights, kept.program, rows, directory, formats, in_fresh_process=in_fresh_process)
        missing = {**kept.missing, **written.missing, "test": "a plain function tells of no test split"}
        for name, reason in missing.items():
            if name in FILES.values():
                log.event("missing", f"the export has no {name}: {reason}", name=name)
        manifest = Manifest(
            study=study.name,
            study_id=study.study_id,
            trial=best.number,
            objective=study.spec.objective.name,
            code_hash=source.code_hash(),
            git_revision=git_revision(source.file),
            options={},
            params=as_json(best.params),
            metric=study.spec.metric,
            direction=study.spec.direction,
            validation=finite(best.value),
            confirmed=confirmed_by(chosen.confirmation),
            test={},
            epochs=len(curve),
            kept=Kept(sha256=hashlib.sha256(data).hexdigest(), rows=len(rows)),
            parameters=kept.parameters,
            trained_parameters=kept.trained_parameters,
            seed=study.spec.trial_seed(best.number),
            study_seed=study.spec.seed,
            learning_curve=as_json([asdict(point) for point in curve]),
            search=search_of(engine, study),
            trained_on=kept.device,
            data={},
            inputs=described(kept.inputs),
            outputs=with_classes(written.outputs, kept.outputs, kept.class_names),
            class_names=kept.class_names,
            versions=versions(),
            created_at=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
            files={name: sha256_of(directory / name) for name in FILES.values() if (directory / name).exists()},
            formats=written.formats,
            missing=missing,
        )
        (directory / CARD).write_text(card(manifest), encoding="utf-8")
        (directory / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return manifest


def _kept(engine: Engine, study: Study, data_dir: Path, number: int) -> bytes:
    """Return what the trial kept. Raises TunerError if that is nothing, or another trial is the best by now."""
    models = KeptModels(study, data_dir, Sessions(engine))
    best = models.best()
    name = study.spec.objective.name
    if best is None:
        raise TunerError(
            f"{name} is a plain function and has no model to export: let it call tuner.keep_model(trial, model,"
            " example_inputs), or write it as a subclass of tuner.Objective"
        )
    if best.number != number:
        raise TunerError(
            f"trial {number} has no model: a study keeps the best one's, which is trial {best.number}'s here;"
            f" --trial {best.number} exports it"
        )
    data = models.read(best)
    if data is None:
        where = "on the machine that ran the trial" if study.spec.checkpoints == LOCAL else study.spec.checkpoints
        raise TunerError(
            f"the model that trial {number} kept is not found: it was kept in {where}; where a better trial has ended"
            " just now, try again"
        )
    return data
