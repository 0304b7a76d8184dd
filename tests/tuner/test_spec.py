import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tuner.errors import TunerError
from tuner.spec import Spec, TrainingSpec, differences, first_problem, parse_spec
from tuner.training import Options


def a_spec(**changes):
    given = {
        "objective": {"name": "digits", "code_hash": "ab" * 32, "options": {"max_units": 256}},
        "metric": "accuracy",
        "direction": "maximize",
        "budget": {"trials": 30},
        "epochs": 20,
    }
    return Spec.model_validate({**given, **changes})


SPECS = st.builds(
    a_spec,
    epochs=st.integers(1, 100),
    seed=st.integers(0, 2**63 - 1),
    direction=st.sampled_from(["maximize", "minimize"]),
    sampler=st.fixed_dictionaries({"name": st.sampled_from(["tpe", "random", "gp", "cmaes", "qmc"])}),
    budget=st.fixed_dictionaries(
        {"trials": st.integers(1, 9)}, optional={"timeout_s": st.floats(1, 99), "max_failures": st.integers(0, 9)}
    ),
)


@given(SPECS)
def test_a_spec_comes_back_from_the_database_as_it_was(spec):
    assert parse_spec(spec.model_dump(mode="json"), "digits") == spec


def test_a_spec_has_the_defaults_of_the_readme():
    spec = a_spec()
    assert (spec.sampler.name, spec.pruner.name, spec.seed, spec.retry.max_attempts) == ("tpe", "median", 0, 3)
    assert (spec.budget.timeout_s, spec.budget.max_failures) == (None, 10)


def test_a_spec_that_was_stored_before_training_had_settings_reads_as_the_defaults():
    stored = a_spec().model_dump(mode="json")
    del stored["training"]
    training = parse_spec(stored, "digits").training
    assert (training.precision, training.data, training.patience) == ("fp32", "auto", None)
    assert (training.compile, training.cuda_graphs, training.deterministic) == (False, False, False)


def test_every_setting_of_training_reaches_it():
    training = TrainingSpec(
        precision="bf16",
        patience=3,
        data="stream",
        compile=True,
        compile_mode="max-autotune",
        compile_backend="aot_eager",
        cuda_graphs=True,
    )
    options = Options(**training.model_dump())
    assert {name: getattr(options, name) for name in TrainingSpec.model_fields} == training.model_dump()


def test_how_to_compile_is_in_a_spec_only_where_it_was_said():
    plain = a_spec(training=TrainingSpec(compile=True))
    assert not {"compile_mode", "compile_backend"} & plain.model_dump()["training"].keys()
    said = a_spec(training=TrainingSpec(compile=True, compile_mode="max-autotune"))
    assert parse_spec(said.model_dump(mode="json"), "digits") == said
    told = "training.compile_mode: the study has default, this command says max-autotune"
    assert differences(plain, said) == [told]


def test_a_spec_cannot_be_changed():
    with pytest.raises(ValidationError, match="frozen"):
        a_spec().seed = 1


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"epochs": 0}, "epochs"),
        ({"budget": {"trials": 0}}, "budget.trials"),
        ({"budget": {"trials": 1, "timeout_s": 0}}, "budget.timeout_s"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"direction": "up"}, "direction"),
        ({"sampler": {"name": "annealing"}}, "sampler.name"),
        ({"pruner": {"name": "hedge"}}, "pruner.name"),
        ({"retry": {"max_attempts": 0}}, "retry.max_attempts"),
        ({"checkpoint_every_s": 0}, "checkpoint_every_s"),
        ({"prunner": {}}, "prunner"),
    ],
)
def test_a_spec_that_cannot_work_is_refused_at_its_place(changes, place):
    with pytest.raises(ValidationError) as caught:
        a_spec(**changes)
    assert first_problem(caught.value).startswith(f"{place}: ")
    assert ", got " in first_problem(caught.value)


@pytest.mark.parametrize(
    ("stored", "told"),
    [
        (None, "study 'fmnist' has no spec: it was not created by tuner; 'tuner adopt fmnist OBJECTIVE' lets"),
        ({**a_spec().model_dump(), "version": 2}, "a spec of version 2, this tuner reads version 1: version: "),
        ({"version": 1}, "study 'fmnist' has a spec of version 1"),
        ([], "study 'fmnist' has a spec of version None"),
    ],
)
def test_a_study_whose_spec_cannot_be_read_is_refused_with_advice(stored, told):
    with pytest.raises(TunerError) as caught:
        parse_spec(stored, "fmnist")
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


@given(SPECS)
def test_a_spec_does_not_differ_from_itself(spec):
    assert differences(spec, spec.model_copy()) == []


@given(SPECS, SPECS)
def test_specs_differ_if_and_only_if_a_difference_is_shown(one, other):
    assert bool(differences(one, other)) == (one != other)
    assert len(differences(one, other)) == len(differences(other, one))


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"seed": 7}, "seed: the study has 0, this command says 7"),
        ({"audit": 0.02}, "audit: the study has none, this command says 0.02"),
        ({"budget": {"trials": 5}}, "budget.trials: the study has 30, this command says 5"),
        ({"budget": {"trials": 30, "timeout_s": 9}}, "budget.timeout_s: the study has None, this command says 9.0"),
        (
            {"pruner": {"name": "median", "settings": {"n_warmup_steps": 3}}},
            "pruner.settings.n_warmup_steps: the study has none, this command says 3",
        ),
        (
            {"pruner": {"name": "median", "settings": {"n_warmup_steps": None}}},
            "pruner.settings.n_warmup_steps: the study has none, this command says None",
        ),
        (
            {"objective": {"name": "digits", "code_hash": "ab" * 32}},
            "objective.options.max_units: the study has 256, this command says none",
        ),
    ],
)
def test_a_difference_names_the_setting_and_both_values(changes, line):
    assert differences(a_spec(), a_spec(**changes)) == [line]
