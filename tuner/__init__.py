"""tuner: hyperparameter search for PyTorch, from the first trial to the exported model.

The command line is the main way in (`tuner --help`). From Python: `Objective` is the base class of what to
search, `load_model` gives an exported model back and `rebuild` the model itself, to train it further; `TunerError` is
what they raise for what a user can mend; `curves` gives the learning curves of a study. In a plain function's own loop
`device`, `checkpoint`, `keep_model` and `callbacks` do what the loop of an Objective has done for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tuner.callbacks as callbacks
    from tuner.errors import TunerError
    from tuner.loops import checkpoint, device, keep_model
    from tuner.model.loading import load_model
    from tuner.model.rebuilding import rebuild
    from tuner.objective import Objective
    from tuner.study.curves import curves

__all__ = [
    "Objective",
    "TunerError",
    "callbacks",
    "checkpoint",
    "curves",
    "device",
    "keep_model",
    "load_model",
    "rebuild",
]


def __getattr__(name: str) -> Any:
    # Most import torch, which commands that train nothing never need.
    if name == "Objective":
        from tuner.objective import Objective

        return Objective
    if name == "load_model":
        from tuner.model.loading import load_model

        return load_model
    if name == "rebuild":
        from tuner.model.rebuilding import rebuild

        return rebuild
    if name == "curves":
        from tuner.study.curves import curves

        return curves
    if name == "TunerError":
        from tuner.errors import TunerError

        return TunerError
    if name in ("checkpoint", "device", "keep_model"):
        from tuner import loops

        return getattr(loops, name)
    if name == "callbacks":
        import importlib

        return importlib.import_module("tuner.callbacks")
    raise AttributeError(f"module 'tuner' has no attribute {name!r}")
