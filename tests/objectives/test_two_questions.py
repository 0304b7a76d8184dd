import pytest
import torch
from attempts import PruneAt, a_spec, attempt
from optuna import create_study
from optuna.trial import TrialState
from searching import some_params, train

from objectives.digits import Digits
from objectives.two_questions import TwoQuestions
from tuner.slot.preflight import preflight
from tuner.training import Interrupted

PARAMS = {"layers": 1, "units_0": 64, "dropout": 0.0, "lr": 3e-3, "batch_size": 32, "weight_even": 1.0}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data():
    return TwoQuestions().load_data(None)


def test_the_rows_are_those_of_digits_with_a_second_answer(data):
    for (_, split), (_, plain) in zip(data.splits(), Digits().load_data(None).splits(), strict=True):
        assert torch.equal(split.inputs, plain.inputs)
        assert torch.equal(split.targets["digit"], plain.targets)
        assert torch.equal(split.targets["even"], 1.0 - plain.targets % 2)


def test_both_questions_are_learned_and_weighed(data):
    objective = TwoQuestions()
    even = []
    for weight in (0.0, 1.0):
        _, history = train(objective, data, {**PARAMS, "weight_even": weight}, epochs=4)
        values = history[-1].metrics
        assert values["accuracy_digit"] > 0.9
        assert values["accuracy"] == pytest.approx((values["accuracy_digit"] + values["accuracy_even"]) / 2)
        even.append(values["accuracy_even"])
    assert even[0] < 0.85 < even[1]


@pytest.mark.slow
def test_it_passes_the_preflight_is_pruned_and_goes_on_from_its_checkpoint(data, tmp_path):
    objective = TwoQuestions(max_units=64)
    assert preflight(objective, a_spec(), data, CPU) == []
    study = create_study(direction="maximize", pruner=PruneAt(2))
    outcome, trial = attempt(study, objective, epochs=3)
    assert (outcome.state, list(trial.intermediate_values)) == (TrialState.PRUNED, [1, 2])

    steps = iter(range(10**6))

    def interrupt():
        if next(steps) == 50:
            raise Interrupted

    (params,) = some_params(objective, {"layers": 1, "batch_size": 32})

    def run(**how):
        its = create_study(direction="maximize")
        its.enqueue_trial(params)
        outcome, trial = attempt(its, objective, **how)
        return outcome.value, trial.intermediate_values, outcome.attrs["accuracy_even"]

    with pytest.raises(Interrupted):
        run(check=interrupt, checkpoints=tmp_path)
    assert run(checkpoints=tmp_path) == run()
    assert next(steps) == 51


@pytest.mark.slow
def test_an_exported_model_gives_both_answers_by_name(exported, data):
    model = exported("two_questions.py:TwoQuestions", PARAMS)
    outputs = model(data.test.inputs[:7])
    assert {name: tuple(its.shape) for name, its in outputs.items()} == {"digit": (7, 10), "even": (7,)}
    manifest = model.manifest
    assert [(its.name, its.shape) for its in manifest.outputs] == [("digit", (10,)), ("even", ())]
    assert manifest.class_names == {"digit": tuple("0123456789"), "even": ("odd", "even")}
    assert manifest.test.keys() == {"accuracy_digit", "accuracy_even", "accuracy"}
    right = (model(data.test.inputs)["even"] > 0) == data.test.targets["even"].bool()
    assert manifest.test["accuracy_even"] == pytest.approx(float(right.double().mean()))
