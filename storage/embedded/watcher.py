"""Ends an embedded server that nobody uses: a small process beside it, from its start to its end.

Run as `python -m storage.embedded.watcher DATA_DIRECTORY HOME LOCK`; LOCK is the descriptor of a lock that it inherits,
by which others see that the server has a watcher.
"""

from __future__ import annotations

import select
import sys
import threading
import time
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, Final

import psycopg2

from storage.database.errors import EmbeddedServerError
from storage.embedded.server import EmbeddedServer

_LOOKS: Final = 10
"""How often it looks during the time after which it ends the server, within the bounds below."""
_PAUSE_MIN_S: Final = 0.1
_PAUSE_MAX_S: Final = 30.0


def main() -> None:
    """Watch the server until it has ended, or is to stay."""
    data_dir, home, lock = sys.argv[1:]
    server = EmbeddedServer(Path(data_dir), home=Path(home))
    pause = threading.Event()
    while True:
        with suppress(EmbeddedServerError):
            if server.end_watch(int(lock)):
                return
        with suppress(psycopg2.Error, EmbeddedServerError):  # it ended, or is recovering from a crash
            _watch(server)
        pause.wait(_PAUSE_MIN_S)


def _watch(server: EmbeddedServer) -> None:
    """Return once the server has ended this session, was ended by us, or is to stay."""
    with closing(server.session()) as session:
        quiet_since, before = time.monotonic(), None
        while (limit_s := server.idle_exit_s()) < float("inf"):
            if (now := server.use(session)) != before or now.sessions:
                quiet_since, before = time.monotonic(), now
            elif time.monotonic() - quiet_since >= limit_s and server.stop_if_unused(session, now):
                return
            if _has_ended(session, min(max(limit_s / _LOOKS, _PAUSE_MIN_S), _PAUSE_MAX_S)):
                return


def _has_ended(session: Any, wait_s: float) -> bool:
    """Wait for so long, or until the server says something unasked: that it ends."""
    poll = select.poll()
    poll.register(session, select.POLLIN)
    return bool(poll.poll(wait_s * 1000))


if __name__ == "__main__":
    main()
