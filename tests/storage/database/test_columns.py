"""Columns read as bytes are what reading them row by row gives."""

from __future__ import annotations

import datetime as dt
import time

import pytest
from sqlalchemy import DateTime, column, select, values

from storage import open_engine
from storage.database.columns import local_times, packed, sent_time
from storage.database.values import local_time

TIMES = [
    dt.datetime(1969, 12, 31, 23, 59, 59, 999999),
    None,
    dt.datetime(1999, 12, 31, 23, 59, 59, 999999),
    # The hours around a change to summer time and back again.
    *(dt.datetime(2026, 3, 29, hour, 30, 0, 1) for hour in range(3)),
    *(dt.datetime(2026, 10, 25, hour, 30, 0, 499999) for hour in range(3)),
    *(dt.datetime(2241, 12, 31, 23, 59, 59, micros) for micros in (1, 2, 333333, 999998, 999999)),
]


@pytest.fixture(params=["UTC", "Europe/Berlin", "Asia/Kathmandu", "America/New_York"])
def zone(request, monkeypatch):
    monkeypatch.setenv("TZ", request.param)
    time.tzset()
    yield request.param
    monkeypatch.undo()
    time.tzset()


@pytest.mark.usefixtures("zone")
def test_packed_times_are_local_to_the_microsecond(server_url):
    rows = values(column("number"), column("utc", DateTime), name="times").data(list(enumerate(TIMES)))
    engine = open_engine(server_url)
    with engine.connect() as conn:
        sent = conn.execute(select(packed(sent_time(rows.c.utc)))).scalar_one()
    engine.dispose()
    assert local_times(sent) == [local_time(when) for when in TIMES]
