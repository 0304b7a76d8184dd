import copy
import json

import pytest
from attempts import Signs, attempt

from tuner.slot.read_params import ReadParams


@pytest.mark.parametrize(
    ("read", "unread"),
    [
        (lambda params: params["lr"], ["units"]),
        (lambda params: params.get("lr"), ["units"]),
        (lambda params: "lr" in params, ["units"]),
        (lambda params: params.get("other"), ["lr", "units"]),
        (len, ["lr", "units"]),
        (dict, []),
        (lambda params: dict(**params), []),
        (lambda params: {**params}, []),
        (list, []),
        (json.dumps, []),
        (lambda params: [value for _, value in params.items()], []),
        (lambda params: sum(params.values()), []),
    ],
)
def test_params_know_which_of_them_were_read(read, unread):
    params = ReadParams({"lr": 0.1, "units": 8})
    read(params)
    assert params.unread == unread
    for copied in (copy.copy(params), copy.deepcopy(params), params.copy()):
        assert copied == {"lr": 0.1, "units": 8}


class Forgetful(Signs):
    def suggest(self, trial):
        super().suggest(trial)
        trial.suggest_int("unitz", 1, 8)
        trial.suggest_float("weight_decay", 0, 0.1)


def test_a_param_that_nothing_reads_is_told_once(study):
    lines = []
    for _ in range(2):
        attempt(study, Forgetful(), log=lines.append)
    assert [line for line in lines if "no method has read" in line] == [
        "trial 0: no method has read unitz: a param that is read by another name, or not at all?"
    ]
