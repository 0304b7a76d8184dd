import pytest

from storage.coordination.history import Ended
from storage.coordination.studies import StateCounts
from tuner.study.comparison import Compared, curve
from tuner.study.joining import AnyStudy

ENDED = [
    Ended(number=2, state="COMPLETE", value=0.5, device_s=10),
    Ended(number=0, state="FAIL", value=None, device_s=5),
    Ended(number=1, state="PRUNED", value=0.1, device_s=5),
    Ended(number=3, state="COMPLETE", value=float("nan"), device_s=10),
    Ended(number=4, state="COMPLETE", value=0.7, device_s=10),
]


@pytest.mark.parametrize(("direction", "last"), [("minimize", 0.5), ("maximize", 0.7)])
def test_a_curve_is_the_best_value_of_complete_trials_as_they_ended(direction, last):
    found = curve(ENDED, direction)
    assert [point.best for point in found] == [0.5, 0.5, 0.5, 0.5, last]
    assert [point.done for point in found] == [1, 1, 2, 3, 4]
    assert [point.device_s for point in found] == [10, 15, 20, 30, 40]


class Standing:
    study = AnyStudy(study_id=1, name="s", metrics=("value",), directions=("maximize",), spec=None)
    counts = StateCounts(complete=3, pruned=1)


def test_best_values_are_told_at_parts_of_the_budget_and_within_times():
    one = Compared(status=Standing, curve=curve(ENDED, "maximize"))
    assert [one.best_at_share(share) for share in (0.1, 0.75, 1.0)] == [0.5, 0.5, 0.7]
    assert [one.best_within(seconds) for seconds in (9, 10, 39, 40, 99)] == [None, 0.5, 0.5, 0.7, 0.7]
    assert Compared(status=Standing, curve=()).best_at_share(1.0) is None
