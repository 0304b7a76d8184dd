"""Browsers' sessions: what the server signed, for a day, until they sign out."""

from __future__ import annotations

import pytest

from tuner.dashboard.sessions import LIFETIME_S, Sessions


@pytest.fixture
def clock() -> list[float]:
    return [1000.0]


@pytest.fixture
def sessions(clock: list[float]) -> Sessions:
    return Sessions(now=lambda: clock[0])


def test_a_session_is_open_for_a_day(sessions: Sessions, clock: list[float]) -> None:
    cookie = sessions.start()
    clock[0] += LIFETIME_S - 1
    assert sessions.is_open(cookie)
    clock[0] += 1
    assert not sessions.is_open(cookie)


def test_nothing_but_what_was_signed_here_is_open(sessions: Sessions) -> None:
    its_id, end, signature = sessions.start().split(".")
    later = f"{int(end) + 1}"
    for cookie in ("", ".", "..", f"{its_id}.{later}.{signature}", f"{its_id}.{end}.", f"x{its_id}.{end}.{signature}"):
        assert not sessions.is_open(cookie), cookie
    assert not sessions.is_open(Sessions().start())
    assert not sessions.is_open("\xff.\ud800.1")
    assert sessions.is_open(f"{its_id}.{end}.{signature}")


def test_a_session_that_signed_out_is_remembered_until_it_would_have_ended(
    sessions: Sessions, clock: list[float]
) -> None:
    first, second = sessions.start(), sessions.start()
    sessions.end(first)
    sessions.end("nonsense")
    assert (sessions.is_open(first), sessions.is_open(second)) == (False, True)
    clock[0] += LIFETIME_S
    sessions.end(sessions.start())
    assert len(sessions._ended) == 1
