"""Where a model goes, without importing torch: whether that can be written, and a link by the study's name."""

from __future__ import annotations

import os
import re
import tempfile
from contextlib import suppress
from pathlib import Path

from tuner.errors import TunerError
from tuner.model.directory import real, refuse_other


def check_output(output: Path) -> None:
    """Raise TunerError unless a directory can be made at `output`, in the place of an export at most.

    Leaves nothing behind.
    """
    place = real(output)
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise TunerError(
            f"the output needs to be a directory, got {output}: {place} is a file; choose another --output"
        )
    if place == real(output):
        refuse_other(output)
        place = place.parent
    try:
        with tempfile.TemporaryDirectory(dir=place, prefix=".tuner-"):
            pass
    except OSError as error:
        raise TunerError(f"cannot write to {place}: {error.strerror}; choose another --output") from error


MAX_NAME_BYTES = 255
# What no file of that name could be made of, or would be hidden or be taken for an option.
_ODD = re.compile(r"[/%\x00-\x1f\x7f]|^[.-]")


def link_by_name(directory: Path, name: str) -> Path | None:
    """Make a link to a study's model beside it that is called like the study, and return it.

    It is the latest model exported under that name; links to this model by another name of the study go. None where a
    directory, or somebody's own link, has the name, or there can be no link. Odd characters are written as in a URL.
    """
    link = directory.with_name(_ODD.sub(lambda odd: f"%{ord(odd[0]):02X}", name))
    if len(os.fsencode(link.name)) > MAX_NAME_BYTES:
        return None
    with suppress(OSError):
        if link.name == directory.name or ((link.exists() or link.is_symlink()) and not _is_ours(link)):
            return None
        for other in directory.parent.iterdir():
            if other.name != link.name and other.is_symlink() and os.readlink(other) == directory.name:
                other.unlink()
        with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".tuner-") as aside:
            made = Path(aside) / "link"
            made.symlink_to(directory.name)
            os.replace(made, link)
        return link
    return None


def _is_ours(link: Path) -> bool:
    return link.is_symlink() and re.fullmatch(r"study-\d+(-[0-9a-f]{8})?", os.readlink(link)) is not None
