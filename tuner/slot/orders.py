"""What a worker orders its slot to do, line by line."""

from __future__ import annotations

import os
import queue
import sys
import threading
from typing import IO, Literal, TypeAlias

Order: TypeAlias = Literal["claim", "alone"]
"""To claim a trial; to run the one that ran out of memory again, now that nothing else runs on the device."""


class Orders:
    """The orders that come in on a stream. Its end is the order to stop: `stop` is set, and nothing waits any more."""

    def __init__(self, stream: IO[str]) -> None:
        self.stop = threading.Event()
        self._queue: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, args=(stream,), daemon=True).start()

    def wait_for(self, order: Order) -> bool:
        """Wait for the order; False if it is to stop instead."""
        while not self.stop.is_set():
            found = self._queue.get()
            if found == order:
                return True
        return False

    def _read(self, stream: IO[str]) -> None:
        for line in stream:
            self._queue.put(line.strip())
        self.stop.set()
        self._queue.put(None)
        # The worker may be gone, and with it the readers of what the objective prints.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.dup2(nowhere, sys.stderr.fileno())
