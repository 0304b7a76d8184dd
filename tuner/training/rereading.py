"""Whether rows are the same each time that they are read, and whoever reads them. Knows nothing of Optuna or of a
database.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from tuner.data import Batch

_CLOSE = 1e-3
"""The part of a tensor's greatest number by which rows may differ: processes sum in another order."""
_FILES = Path("/proc/self/fd")  # of Linux; elsewhere there is no telling


def is_alike(first: Batch, second: Batch) -> bool:
    """Whether two batches hold the same rows."""
    pairs = zip(first.columns, second.columns, strict=True)
    return all(one.shape == other.shape and _is_close(one, other) for one, other in pairs)


def places() -> dict[str, tuple[str, int]]:
    """Return the files that this process has open to read them, and where it would read on in each, by descriptor."""
    found = {}
    for descriptor in _FILES.iterdir() if _FILES.exists() else ():
        with suppress(OSError):  # one that is closed by now, as that of the directory itself
            file = os.readlink(descriptor)
            known = dict(
                line.split(":", 1) for line in Path("/proc/self/fdinfo", descriptor.name).read_text().splitlines()
            )
            if Path(file).is_file() and int(known["flags"], 8) & os.O_ACCMODE != os.O_WRONLY:
                found[descriptor.name] = file, int(known["pos"])
    return found


def moved(before: dict[str, tuple[str, int]], after: dict[str, tuple[str, int]]) -> str | None:
    """Return a file that has been open all the while and was read, None if there is none.

    Processes that are forked share the place of such a file: one reads on where another has gone to.
    """
    for descriptor, (file, place) in before.items():
        if descriptor in after and after[descriptor][0] == file and after[descriptor][1] != place:
            return file
    return None


def _is_close(one: Tensor, other: Tensor) -> bool:
    if not one.is_floating_point():
        return bool((one == other).all())
    greatest = float(one.abs().max()) if one.numel() else 0.0
    return bool(((one - other).abs() <= _CLOSE * greatest).all())
