"""The token that opens the dashboard: where it comes from, and that it may change."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

from storage.database.errors import StorageError
from storage.database.private import read_private
from tuner.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from tuner.log import Log


class Token:
    """The token as its file holds it at each request; one from the environment is for good.

    While the file cannot be read, or holds no token, the last one counts, and a line of the log says so.
    """

    def __init__(self, first: str, path: Path | None, log: Log) -> None:
        self._last = first
        self._path = path
        self._log = log
        self._told: str | None = None

    def __call__(self) -> str:
        """Return the token as it is now."""
        if self._path is not None:
            try:
                self._last, self._told = read_token(self._path) or self._last, None
            except UsageError as error:
                if str(error) != self._told:
                    self._log.event("note", f"{error}; until then the token is what it was")
                self._told = str(error)
        return self._last


def find_token(path: Path | None, log: Log) -> Token | None:
    """Return the token of `read_token`, None if there is none. Raises UsageError."""
    first = read_token(path)
    return None if first is None else Token(first, path, log)


def read_token(path: Path | None, environ: Mapping[str, str] = os.environ) -> str | None:
    """The access token from a private file (see `read_private`), or else from TUNER_DASHBOARD_TOKEN.

    None if neither is given. Raises UsageError if the file cannot be read or is not private, or if the token could be
    guessed.
    """
    if path is not None:
        source, token = str(path), _read_file(path)
    elif "TUNER_DASHBOARD_TOKEN" in environ:
        source, token = "TUNER_DASHBOARD_TOKEN", environ["TUNER_DASHBOARD_TOKEN"]
    else:
        return None
    if not re.fullmatch(r"[!-~]{16,}", token.strip()):
        raise UsageError(
            "the dashboard's token must be 16 or more ASCII letters, digits and signs without a space, "
            f"what {source} holds is not; make one with 'openssl rand -hex 32'"
        )
    return token.strip()


def _read_file(path: Path) -> str:
    try:
        return read_private(path, "token file")
    except StorageError as error:
        raise UsageError(f"{error}; check '--token-file'") from error
