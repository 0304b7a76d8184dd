"""What is called again while the database is away, and what is told of it."""

from __future__ import annotations

from storage.database.errors import NotLetInError, UnreachableError
from storage.database.sessions import Backoff


def test_an_outage_is_told_once_and_that_it_lets_nobody_in_as_well() -> None:
    errors = [UnreachableError("lost"), NotLetInError("refused"), UnreachableError("lost again")]
    told: list[str] = []

    def call() -> int:
        if errors:
            raise errors.pop(0)
        return 7

    backoff = Backoff(notice=lambda error: told.append(str(error)))
    assert backoff(call) == 7
    assert told == ["lost", "refused"]
    errors.append(UnreachableError("lost once more"))
    assert backoff(call) == 7
    assert told == ["lost", "refused", "lost once more"]
