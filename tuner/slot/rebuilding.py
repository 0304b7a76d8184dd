"""Whether the params of a trial are still what the objective suggests, and give a model, before they are run again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tuner.errors import TunerError, UsageError
from tuner.objective import Objective
from tuner.slot.attempt import built_model
from tuner.slot.where import with_line
from tuner.study.params import ParamError, as_param
from tuner.study.sampling import suggested_by


def check_params(objective: Objective, params: Mapping[str, Any], shown: str) -> None:
    """Raise TunerError if the objective does not suggest just these params, or builds no model of them.

    `shown` is the trial that they are of. What is suggested beside them would be drawn anew for each run.
    """
    try:
        why = _why_not(objective, dict(params))
    except (UsageError, ParamError) as error:
        why = str(error)
    if why is not None:
        raise TunerError(
            f"{shown} cannot be run again by the code of {type(objective).__name__} that is here: {why};"
            " the code that it ran with can"
        )


def _why_not(objective: Objective, params: dict[str, Any]) -> str | None:
    suggested = suggested_by(objective, params)
    if gone := [name for name in params if name not in suggested]:
        return f"suggest does not suggest its {', '.join(gone)}"
    if new := [name for name in suggested if name not in params]:
        return f"suggest suggests {', '.join(new)}, which it has not"
    for name, value in params.items():
        as_param(name, suggested[name], value)
    try:
        built_model(objective, params, torch.device("cpu"))
    except Exception as error:  # noqa: BLE001 - of the objective's code
        return f"build_model failed: {with_line(error, objective)}"
    return None
