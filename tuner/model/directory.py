"""The directory of an export, which is there as a whole at any time: the old one, or the new one.

A new one is written beside it, as `.NAME.tuner-TOKEN`, and takes its place by one system call that exchanges the two.
Where the system has none, the old one is moved to `.NAME.tuner-old` first; until the new one is there, that is the
export. What a process that was killed has left behind goes with the next export to the same place.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from storage.files import sync_directory
from tuner.errors import TunerError
from tuner.model.manifest import MANIFEST, is_export, read_manifest

CARD = "README.md"
_AT_FDCWD, _EXCHANGE_LINUX, _SWAP_MACOS = -100, 2, 2
# What file systems answer that cannot exchange two directories, such as NFS.
_CANNOT = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM)


@contextmanager
def replacing(output: Path) -> Iterator[Path]:
    """Yield a new directory, which takes the place of the export at `output` when the block ends.

    What somebody else has put beside the export's files stays there. If the block fails, all is as it was: parents of
    `output` that were not there are gone. Raises TunerError if it cannot be written, and at the end of the block if
    something that is no export has come to lie there.
    """
    place = real(output)
    made = [parent for parent in place.parents if not parent.exists()]
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with _aside(place) as directory:
            yield directory
            _keep_others(place, directory)
            _sync(directory)
            _put(directory, place)
    except OSError as error:
        raise TunerError(
            f"cannot write the model to {output}: {error.strerror or error}; free some space or choose another --output"
        ) from error
    finally:
        if made and not place.exists():
            with suppress(OSError):  # somebody else uses it by now
                for parent in made:
                    parent.rmdir()


def real(output: Path) -> Path:
    """Return where the directory itself is to lie: `output` may be a link to it."""
    return Path(os.path.realpath(output))


def current(output: Path) -> Path:
    """Return where the export at `output` lies now, which is beside it if a process was killed as it was replaced."""
    place = real(output)
    old = _old(place)
    return old if not place.exists() and is_export(old) else output


def refuse_other(output: Path) -> None:
    """Raise TunerError if a directory at `output` is not to be replaced as a whole: it is no export, nor empty."""
    place = real(output)
    if os.path.ismount(place) or place == Path.cwd():
        what = "a mount point" if os.path.ismount(place) else "the current directory"
        raise TunerError(
            f"the output needs to be a directory that can be replaced as a whole, got {output}, {what};"
            " choose one in it: --output model"
        )
    others = [name for name in os.listdir(place) if not name.startswith(".tuner-")]
    if others and not is_export(place):
        raise TunerError(
            f"the output needs to be an export, or empty, got {output}, which holds {min(others)!r} and no"
            f" {MANIFEST} of an export; choose another --output"
        )


@contextmanager
def _aside(place: Path) -> Iterator[Path]:
    """Yield a new directory beside `place`, and remove what then bears its name; recover what others have left."""
    directory = place.with_name(f".{place.name}.tuner-{secrets.token_hex(4)}")
    with ExitStack() as locks:
        with ExitStack() as beside:  # against who would take the new directory for one that was left behind
            _lock(place.parent, beside, wait=True)
            _recover(place)
            directory.mkdir()
            _lock(directory, locks, wait=True)
        try:
            yield directory
        finally:
            shutil.rmtree(directory, ignore_errors=True)


def _recover(place: Path) -> None:
    """Put an old export back that was on its way out, and remove what processes that are gone have left beside it."""
    old = _old(place)
    if not place.exists() and is_export(old):
        os.rename(old, place)
    for left in [path for path in place.parent.iterdir() if path.name.startswith(f".{place.name}.tuner-")]:
        with ExitStack() as lock, suppress(OSError):  # it may be no directory, or have gone
            if _lock(left, lock, wait=False):
                shutil.rmtree(left)


def _put(directory: Path, place: Path) -> None:
    """Give the directory the place, and its own name to what was there, if anything was."""
    if not place.exists():
        os.rename(directory, place)
    else:
        refuse_other(place)
        shutil.copymode(place, directory)
        if not _exchange(directory, place):
            # It may be left where no lock could tell that it was: NFS locks no directories.
            shutil.rmtree(_old(place), ignore_errors=True)
            os.rename(place, _old(place))
            os.rename(directory, place)
            shutil.rmtree(_old(place), ignore_errors=True)
    sync_directory(place.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two directories at once; False where that cannot be done. Raises OSError for other reasons."""
    libc = ctypes.CDLL(None, use_errno=True)
    paths = os.fsencode(one), os.fsencode(other)
    if sys.platform == "linux" and hasattr(libc, "renameat2"):
        failed = libc.renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _EXCHANGE_LINUX)
    elif sys.platform == "darwin":
        failed = libc.renamex_np(*paths, _SWAP_MACOS)
    else:
        return False
    if failed and (code := ctypes.get_errno()) not in _CANNOT:
        raise OSError(code, os.strerror(code), str(other))
    return not failed


def _keep_others(place: Path, directory: Path) -> None:
    """Have what somebody else has put into the old export in the new one as well, as the very same files."""
    if not is_export(place):
        return
    ours = {MANIFEST, CARD, *read_manifest(place).files, *os.listdir(directory)}
    for entry in sorted(place.iterdir()):
        if entry.name in ours or entry.name.startswith(".tuner-"):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, directory / entry.name, symlinks=True, copy_function=_link)
        else:
            _link(entry, directory / entry.name)


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # a file system without links
        shutil.copy2(source, target, follow_symlinks=False)


def _sync(directory: Path) -> None:
    for path in directory.iterdir():
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    sync_directory(directory)


def _old(place: Path) -> Path:
    return place.with_name(f".{place.name}.tuner-old")


def _lock(directory: Path, locks: ExitStack, *, wait: bool) -> bool:
    """Lock the directory until the stack is closed or the process ends; False where that cannot be.

    Somebody else holds the lock and there is no time to `wait`, or its file system has none.
    """
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    locks.callback(os.close, handle)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True
