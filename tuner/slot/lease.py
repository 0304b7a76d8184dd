"""Keeping the right to a trial while it runs."""

from __future__ import annotations

import threading

from storage.coordination import claims
from storage.database.errors import StorageError
from storage.database.sessions import Sessions

RENEW_S = claims.LEASE_S / 4
AGAIN_S = 1.0
"""How soon a renewal that failed is tried again; in time for `standings.RETURN_S` once the database is back."""


class Lease:
    """Renews a claim on a thread while its trial runs. `lost` is set once somebody else may hold the trial."""

    def __init__(self, sessions: Sessions, held: claims.Claim) -> None:
        """`sessions` must not wait for a database that is away."""
        self.lost = threading.Event()
        self._sessions = sessions
        self._held = held
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name=f"lease of trial {held.number}", daemon=True)

    def __enter__(self) -> Lease:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()  # and not waited for: a renewal may hang in a network that is gone

    def _renew(self) -> None:
        pause_s = RENEW_S
        while not self._ended.wait(pause_s):
            try:
                if not claims.renew(self._sessions, self._held) and not self._ended.is_set():
                    self.lost.set()
                    return
                pause_s = RENEW_S
            except StorageError:
                pause_s = AGAIN_S  # away: the lease may outlast it, or be left alone until the holder is back
