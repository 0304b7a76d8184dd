"""The model itself, built by its objective with the weights of an export: to train it further, or to look into it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import nn

from tuner.errors import TunerError, first_line
from tuner.formats.weights import WEIGHTS
from tuner.model.loading import checked
from tuner.objective import Objective, Params
from tuner.settings import Settings
from tuner.slot.where import with_line
from tuner.study.registry import build_objective, find_objective, is_objective_class, source_of
from tuner.study.written import written_here
from tuner.training.compiled import load_state, uncompiled

REBUILT: Final = "rebuild"
"""What the manifest's `missing` calls a model that its objective does not build again."""


def rebuild(
    path: str | Path,
    *,
    objective: str | type[Objective] | None = None,
    device: str | torch.device = "cpu",
    allow_code_change: bool = False,
) -> nn.Module:
    """Return the model of the export in directory `path`, as its objective builds it, with the exported weights.

    It is in eval mode and all of its weights can be trained; its outputs are those of the objective's model, before
    `prediction`. `objective` is `path/to/file.py:NAME` or the class, where it is neither an installed one nor one that
    was written on this machine of a notebook or a script. Code is run: that of the objective, which is never taken from
    the export. Raises TunerError if the export is damaged or lacks a weight, or if the objective's code is another,
    unless `allow_code_change`.
    """
    directory, manifest = checked(Path(path))
    if manifest.kept is not None:
        raise TunerError(
            f"{path} is of a plain function, which has no build_model: load_model gives its program, and {WEIGHTS} has"
            " its weights"
        )
    data_dir = Settings.of_environment().data_dir
    if objective is None and ":" in manifest.objective:
        objective = written_here(data_dir, manifest.objective, manifest.code_hash)
    if objective is None and ":" in manifest.objective:
        raise TunerError(
            f"{path} is a model of {manifest.objective!r}, a file of the one who exported it;"
            f" give yours: rebuild({str(path)!r}, objective='path/to/{manifest.objective}')"
        )
    if objective is None or isinstance(objective, str):
        source = find_objective(objective or manifest.objective)
    else:
        source = source_of(objective, data_dir)
    if not allow_code_change and (found := source.code_hash()) != manifest.code_hash:
        raise TunerError(
            f"{path} was made by code with the sha256 {manifest.code_hash[:12]}, {source.file} has {found[:12]};"
            " take the file of then, or allow_code_change=True"
        )
    if lost := [name for name in manifest.missing if name == REBUILT or name.startswith(f"{WEIGHTS}: ")]:
        raise TunerError(f"{path} cannot be rebuilt, it lacks {lost[0]}: {manifest.missing[lost[0]]}")
    kind = source.load()
    if not is_objective_class(kind):
        raise TunerError(f"{source.name} is a plain function and has no model to rebuild")
    made = build_objective(kind, manifest.options, manifest.study_seed or 0)
    try:
        weights = load((directory / WEIGHTS).read_bytes())
        model = built(made, manifest.params, weights)
    except (SafetensorError, OSError) as error:
        raise TunerError(f"cannot read {WEIGHTS} of {path}: {first_line(error)}") from error
    return model.to(device)


def built(objective: Objective, params: Params, weights: Mapping[str, Any]) -> nn.Module:
    """Return a new model of these params with these weights, in eval mode. Raises TunerError if they do not fit."""
    try:
        model = uncompiled(objective.build_model(params))
        load_state(model, weights)
    except Exception as error:
        raise TunerError(f"the model cannot be built again: {with_line(error, objective)}") from error
    return model.eval()
