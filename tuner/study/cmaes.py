"""Optuna's CMA-ES sampler, reading the state that it keeps in a study's trials without running any of it."""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from typing import Any, Final

from optuna.samplers import CmaEsSampler
from optuna.trial import FrozenTrial

MAX_STATE_CHARS: Final = 1 << 24

# The optimizers of `cmaes`, which are numbers and arrays of them, and what numpy pickles arrays and scalars by: of
# numpy 2, and of numpy 1.
_CLASSES: Final = frozenset(
    {
        ("cmaes._cma", "CMA"),
        ("cmaes._sepcma", "SepCMA"),
        ("cmaes._cmawm", "CMAwM"),
        ("numpy", "dtype"),
        ("numpy", "ndarray"),
        *((f"numpy.{core}.multiarray", name) for core in ("_core", "core") for name in ("_reconstruct", "scalar")),
    }
)


# What unpickling raises for bytes that are cut, are none, or ask for what there is not.
_UNREADABLE: Final = (
    pickle.UnpicklingError,
    EOFError,
    AttributeError,
    LookupError,
    ValueError,
    TypeError,
    ArithmeticError,
    MemoryError,
)


class SafeCmaEsSampler(CmaEsSampler):
    """Goes on from the state that a finished trial's attributes hold, as Optuna's does, if it is numbers and no code.

    Whoever may write to the database may write these attributes, and Optuna's sampler unpickles what they hold in
    every process that samples.
    """

    def _restore_optimizer(self, completed_trials: Sequence[FrozenTrial]) -> Any:
        for trial in reversed(completed_trials):
            attrs = {name: its for name, its in trial.system_attrs.items() if name.startswith(self._attr_key_optimizer)}
            if attrs and (found := restored(attrs, self._attr_key_optimizer)) is not None:
                return found
        return None


def restored(attrs: dict[str, Any], key: str) -> Any:
    """Return the optimizer whose parts the attributes are, None for what is none or needs code to be read."""
    try:
        text = "".join(attrs[f"{key}:{index}"] for index in range(len(attrs)))
        if len(text) > MAX_STATE_CHARS:
            return None
        found = _Unpickler(io.BytesIO(bytes.fromhex(text))).load()
        whole = (found.dim, found.generation, found.population_size)  # one that was made without its state has none
    except _UNREADABLE:
        return None
    is_optimizer = type(found).__module__.startswith("cmaes.") and all(isinstance(its, int) for its in whole)
    return found if is_optimizer else None


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _CLASSES:
            raise pickle.UnpicklingError(f"{module}.{name} is no part of an optimizer's state")
        return super().find_class(module, name)
