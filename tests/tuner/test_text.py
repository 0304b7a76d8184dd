import pytest

from tuner.text import duration, number_text, params_text, printable, table


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (9.4, "0:09"), (59.6, "1:00"), (75, "1:15"), (3599, "59:59"), (3700, "1:01:40")]
)
def test_a_duration_reads_as_a_clock_does(seconds, text):
    assert duration(seconds) == text


def test_numbers_have_six_digits_at_most():
    assert [number_text(value) for value in (None, 0.0, 1 / 3, float("nan"))] == ["-", "0", "0.333333", "nan"]
    assert params_text({"lr": 1 / 3, "units": 64, "kind": "a"}) == "lr=0.333333 units=64 kind=a"
    assert params_text({}) == "-"


@pytest.mark.parametrize(
    ("text", "shown"),
    [("née [bold]x[/]", "née [bold]x[/]"), ("a\x1b[2Jb\r\nc", "a\\x1b[2Jb\\r\\nc"), ("\u202eevil", "\\u202eevil")],
)
def test_text_cannot_drive_a_terminal(text, shown):
    assert printable(text) == shown


def test_the_columns_of_a_table_are_as_wide_as_what_is_in_them():
    assert list(table(["a", "bcd", "e"], [["long", 1, "x\ny"], ["s", 22, ""]])) == [
        "a     bcd  e",
        "long  1    x\\ny",
        "s     22",
    ]
