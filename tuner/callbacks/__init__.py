"""What others' training loops call, for a trial. Each needs the package of its loop, imported when it is asked for.

`Lightning` is for the Trainer of Lightning (the extra `lightning`), `Transformers` for that of transformers (the extra
`transformers`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tuner.callbacks.trainer import Lightning
    from tuner.callbacks.transformers_trainer import Transformers

__all__ = ["Lightning", "Transformers"]


def __getattr__(name: str) -> Any:
    if name == "Lightning":
        from tuner.callbacks.trainer import Lightning

        return Lightning
    if name == "Transformers":
        from tuner.callbacks.transformers_trainer import Transformers

        return Transformers
    raise AttributeError(f"module 'tuner.callbacks' has no attribute {name!r}")
