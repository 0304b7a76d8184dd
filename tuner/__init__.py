"""tuner: hyperparameter search for PyTorch, from the first trial to the exported model.

What the command line does (`tuner --help`) can be done from Python, in a script or a notebook: `Objective` is the base
class of what to search; `run` searches with local workers, `create_study` makes a study for workers elsewhere; `best`,
`trials` and `curves` tell what came of it, `load_study` gives Optuna's study; `export` makes a model of it, which
`load_model` gives back, and `rebuild` the model itself, to train it further. In a plain function's own loop `device`,
`checkpoint`, `keep_model` and `callbacks` do what the loop of an Objective has done for it. `TunerError` is what they
raise for what a user can mend.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tuner.callbacks as callbacks
    from tuner.api.python import best, create_study, export, load_study, run, trials
    from tuner.errors import TunerError
    from tuner.loops import checkpoint, device, keep_model
    from tuner.model.loading import load_model
    from tuner.model.rebuilding import rebuild
    from tuner.objective import Objective
    from tuner.study.curves import curves

__all__ = [
    "Objective",
    "TunerError",
    "best",
    "callbacks",
    "checkpoint",
    "create_study",
    "curves",
    "device",
    "export",
    "keep_model",
    "load_model",
    "load_study",
    "rebuild",
    "run",
    "trials",
]

# Most import torch, which commands that train nothing never need.
_MODULES = {
    "Objective": "tuner.objective",
    "TunerError": "tuner.errors",
    "best": "tuner.api.python",
    "checkpoint": "tuner.loops",
    "create_study": "tuner.api.python",
    "curves": "tuner.study.curves",
    "device": "tuner.loops",
    "export": "tuner.api.python",
    "keep_model": "tuner.loops",
    "load_model": "tuner.model.loading",
    "load_study": "tuner.api.python",
    "rebuild": "tuner.model.rebuilding",
    "run": "tuner.api.python",
    "trials": "tuner.api.python",
}


def __getattr__(name: str) -> Any:
    if name == "callbacks":
        return import_module("tuner.callbacks")
    if name not in _MODULES:
        raise AttributeError(f"module 'tuner' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
