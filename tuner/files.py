"""Files that are whole at any time, and on the disk once a call has returned."""

from __future__ import annotations

import os
import socket
import tempfile
from contextlib import suppress
from pathlib import Path

_TRIED_BYTES = 1 << 20


def replace(path: Path, data: bytes | memoryview) -> None:
    """Write a file aside, sync it and put it in the place of the one that is there.

    Raises OSError, and then leaves that one as it was and nothing beside it.
    """
    aside = path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with aside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        sync_directory(path.parent)
    except OSError:
        with suppress(OSError):
            aside.unlink()
        raise


def refuses_writes(directory: Path) -> str | None:
    """Return why nothing can be kept in a directory, which is made if it is not there; None if it can."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(bytes(_TRIED_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.strerror or str(error)
    return None


def sync_directory(directory: Path) -> None:
    """Have the disk keep which files are in a directory."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
