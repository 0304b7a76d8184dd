"""Row 10: who may read the database can neither fill the disk nor hold up those who write."""

from __future__ import annotations

from typing import TYPE_CHECKING

import psycopg2
import pytest
from forbidden import check_is_refused_all

if TYPE_CHECKING:
    from storage import EmbeddedServer


def test_the_embedded_servers_reader_reads_and_no_more(server: EmbeddedServer) -> None:
    check_is_refused_all(server.reader_url())


def test_a_sort_of_the_reader_cannot_fill_the_disk(server: EmbeddedServer) -> None:
    connection = psycopg2.connect(server.reader_url())
    with connection.cursor() as cursor:
        cursor.execute("SELECT current_setting('temp_file_limit'), rolconnlimit FROM pg_roles WHERE rolname = user")
        assert cursor.fetchone() == ("1GB", 20)
        with pytest.raises(psycopg2.errors.InsufficientPrivilege):
            cursor.execute("SET temp_file_limit = '1TB'")
    connection.close()
