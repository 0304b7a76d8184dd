"""Whether a directory for a model can be written, known before hours of search and without importing torch."""

from __future__ import annotations

import tempfile
from pathlib import Path

from tuner.errors import TunerError


def check_output(output: Path) -> None:
    """Raise TunerError unless a directory can be made and written at `output`; leaves nothing behind."""
    place = output
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise TunerError(
            f"the output needs to be a directory, got {output}: {place} is a file; choose another --output"
        )
    try:
        with tempfile.TemporaryDirectory(dir=place, prefix=".tuner-"):
            pass
    except OSError as error:
        raise TunerError(f"cannot write to {place}: {error.strerror}; choose another --output") from error
