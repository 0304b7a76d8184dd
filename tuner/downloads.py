"""Data sets that are downloaded once for all processes of a machine, and what is wrong with those that are there."""

from __future__ import annotations

import fcntl
import os
import pickle
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.error import URLError

from storage.files import UntrustedError, own_directory, require_own_files
from tuner.errors import DataError

# What readers of files raise for one that was cut off or is something else: of torch, NumPy, pickle and zlib.
_UNREADABLE = (RuntimeError, ValueError, LookupError, AssertionError, EOFError, pickle.UnpicklingError, zlib.error)


@contextmanager
def downloading(name: str, directory: Path, *, pickled: bool = False) -> Iterator[None]:
    """Let the block read a data set from `directory`, or download it there, in one process at a time.

    Raises DataError, in one line, if the data set is neither there nor to be had, may not be read, or is damaged; and
    if anybody else could write to the directory. What is `pickled` is code to whoever reads it: none of the directory's
    files may be anybody else's then.
    """
    try:
        own_directory(directory)
        if pickled:
            require_own_files(directory)
        handle = os.open(directory, os.O_RDONLY)
        try:
            with suppress(OSError):  # a network file system may lock no directories
                fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)
    except DataError:
        raise
    except UntrustedError as error:
        raise DataError(f"{name} is not read from {directory}: {error}") from error
    except (OSError, *_UNREADABLE) as error:
        raise DataError(_why_not(error, name, directory)) from error


def _why_not(error: Exception, name: str, directory: Path) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.filename is not None and not isinstance(error, URLError):
        return f"{name} cannot be read from {directory} or kept there ({text}): check its path and permissions"
    # torchvision tells of the network, and of what is missing, by a RuntimeError; torch of too few bytes.
    if isinstance(error, OSError) or (isinstance(error, RuntimeError) and "download" in text):
        # What is in a directory that is closed to us seems not to be there.
        closed = [path for path in directory.rglob("*") if not os.access(path, os.R_OK, effective_ids=True)]
        return (
            f"{name} is not in {directory} and cannot be downloaded ({text}"
            f"{f'; no permission to read {closed[0]}' if closed else ''}):"
            " copy it there from a machine that has it, or connect this one to the network"
        )
    cause = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return f"{name} in {directory} is damaged or incomplete ({cause}): delete its files there, to have them downloaded"
