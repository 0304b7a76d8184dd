"""Whether an export's figures of the test split come out again, by its objective and its data. Nothing is recorded."""

from __future__ import annotations

import math
from pathlib import Path

from tuner import training
from tuner.errors import TunerError, UsageError
from tuner.model.directory import current
from tuner.model.loading import load_model
from tuner.model.manifest import Manifest, read_manifest
from tuner.model.verifying import Check
from tuner.slot.attempt import load_data
from tuner.slot.where import with_line
from tuner.study.registry import ObjectiveSource, build_objective, find_objective, is_objective_class

TOLERANCE = 1e-3
"""By what share of it a figure may differ: sums in another order, of another device, round otherwise."""
ROUNDING = 1e-6


def source_of(path: Path, reference: str | None) -> ObjectiveSource:
    """Return the export's objective: the one that is given, or the installed one that the manifest names.

    What a manifest names is never imported as a file or a module. Raises UsageError if it is one of those.
    """
    name = read_manifest(current(path)).objective
    if reference is None and ":" in name:
        raise UsageError(
            f"{path} is of {name!r}, a file of the one who made it; give yours: --objective path/to/{name}"
        )
    return find_objective(reference or name)


def measure(path: Path, source: ObjectiveSource, *, data_dir: Path, allow_code_change: bool = False) -> list[Check]:
    """Return whether the data is what the export was made of, and each figure what the program gives on test.

    A figure may differ by a thousandth, or where there are classes by what one row more or less makes of a
    share of them. Raises TunerError if there is no program, other code of the objective, or no data.
    """
    directory = current(path)
    manifest = read_manifest(directory)
    if source.name != manifest.objective:
        raise TunerError(f"{path} is of the objective {manifest.objective!r}, got {source.name!r}")
    found = source.code_hash()
    if found != manifest.code_hash and not allow_code_change:
        raise TunerError(
            f"{path} was made by other code of {manifest.objective!r}: it has {manifest.code_hash[:12]}, {source.file}"
            f" is {found[:12]}; install the same version, or pass --allow-code-change"
        )
    kind = source.load()
    if not is_objective_class(kind):
        raise TunerError(f"{source.name} is a plain function and has no metrics")
    objective = build_objective(kind, manifest.options, manifest.study_seed or 0)
    data = load_data(objective, data_dir)
    wanted, here = str(manifest.data.get("fingerprint")), data.fingerprint()
    if wanted != here:
        why = "it is other data"
        if manifest.study_seed is None:
            why += ", or split by another seed, which an export of before 0.2 does not tell"
        return [Check(name="data", problem=f"needs the fingerprint {wanted[:12]}, got {here[:12]}: {why}")]
    model = load_model(directory)
    try:
        values = training.evaluate(model, data.test, objective.build_metrics(data))
    except Exception as error:
        raise TunerError(f"the test split cannot be evaluated: {with_line(error, objective)}") from error
    return [Check(name="data", problem=None), *_compared(manifest, values, len(data.test))]


def _compared(manifest: Manifest, values: dict[str, float], n_rows: int) -> list[Check]:
    checks = []
    if not manifest.test:
        checks.append(Check(name="test", problem=f"the export has no figures: {manifest.missing.get('test', 'none')}"))
    for name, wanted in manifest.test.items():
        found = values.get(name, math.nan)
        allowed = TOLERANCE * abs(wanted or 0.0)
        if manifest.class_names:
            allowed = max(allowed, 1 / n_rows + ROUNDING)
        problem = None if _is_close(wanted, found, allowed) else f"needs {_shown(wanted)}, got {_shown(found)}"
        checks.append(Check(name=f"test {name}", problem=problem))
    return checks


def _is_close(wanted: float | None, found: float, allowed: float) -> bool:
    if wanted is None:
        return not math.isfinite(found)
    return math.isfinite(found) and abs(found - wanted) <= allowed


def _shown(value: float | None) -> str:
    return "none that is finite" if value is None or not math.isfinite(value) else f"{value:.6g}"
