"""Where libraries keep what they load again, where that is code and the place would be anybody's."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Final

from storage.files import own_directory

_VARIABLE: Final = "TORCHINDUCTOR_CACHE_DIR"
_NOWHERE: Final = Path(os.devnull, "no usable directory for temporary files, set TMPDIR")


def keep_compiled_apart() -> None:
    """Have `torch.compile`, here and in processes that are started from here, load only what this user has compiled.

    It keeps pickles and libraries in a directory of /tmp that anybody could have made. One that the variable names is
    the user's choice. Where there is no directory for temporary files, nothing can be compiled, and nothing is loaded.
    """
    if _VARIABLE in os.environ:
        return
    try:
        directory = own_directory(Path(tempfile.gettempdir(), f"tuner-torchinductor-{os.geteuid()}"))
    except OSError:  # somebody else was there first
        try:
            directory = Path(tempfile.mkdtemp(prefix="tuner-torchinductor-"))
        except OSError:  # most trainings need none; one that does says by this name what is missing
            directory = _NOWHERE
    os.environ[_VARIABLE] = str(directory)


def compiled_directory() -> Path | None:
    """Return where `torch.compile` keeps what it compiled, None where that was left to torch."""
    directory = os.environ.get(_VARIABLE)
    return Path(directory) if directory else None
