"""How audited trials stand beside the complete ones."""

import pytest

from tuner.study.audits import Audits, judged, wilson


@pytest.mark.parametrize(
    ("count", "n", "low", "high"),
    [(0, 10, 0.0, 0.2775), (1, 10, 0.0179, 0.4042), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0)],
)
def test_an_interval_is_wilsons(count, n, low, high):
    share = wilson(count, n)
    assert (share.count, share.share) == (count, count / n)
    assert (share.low, share.high) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))


@pytest.mark.parametrize("n", range(1, 60))
def test_an_interval_holds_its_share_whatever_is_rounded(n):
    for count in range(n + 1):
        share = wilson(count, n)
        assert 0 <= share.low <= share.share <= share.high <= 1


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_audited_trials_are_counted_by_what_they_would_have_been(direction):
    sign = 1 if direction == "minimize" else -1
    complete = [sign * float(number) for number in range(1, 20)]  # with one more, the best two are the top tenth
    found = judged([sign * value for value in (0.5, 1.5, 2.5, 9.5, 12.0)] + [None], complete, direction, 7.0)
    assert (found.audited, found.seconds) == (6, 7.0)
    assert [its.count for its in (found.best, found.top_tenth, found.above_median) if its] == [1, 2, 4]


def test_nothing_is_said_without_anything_to_compare():
    assert judged([1.0], [], "minimize") == Audits(audited=1, seconds=0.0)
    assert judged([], [1.0], "minimize") == Audits(audited=0, seconds=0.0)
