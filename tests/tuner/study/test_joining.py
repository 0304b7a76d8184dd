import textwrap

import optuna
import pytest

from objectives.digits import Digits
from storage import StudyNotFoundError, open_storage
from storage.coordination import claims, control
from storage.database.errors import StudyExistsError
from storage.database.sessions import Sessions
from tuner.errors import TunerError, UsageError
from tuner.spec import Budget, TrainingSpec
from tuner.study.joining import Wanted, best_of, check_code, create_or_join, create_study, open_study, plan, why_failed
from tuner.study.registry import find_objective

GIVEN = {
    "options": {},
    "budget": Budget(trials=30),
    "epochs": None,
    "sampler": "tpe",
    "pruner": "median",
    "direction": None,
    "seed": 0,
}


def a_plan(source=None, kind=Digits, **changes):
    return plan(source or find_objective("digits"), kind, **{**GIVEN, **changes})


def a_spec(**changes):
    return a_plan(**changes)[0]


def wanted(source=None, kind=Digits, given=(), **changes):
    """What a command wants: `changes` were said, of a budget and of the training the fields `given`."""
    settings = {**GIVEN, "training": TrainingSpec(), "option_texts": {}, "checkpoints": "database"}
    settings |= {"checkpoint_every_s": 30.0, **changes}
    said = {*changes, *given} - {"budget", "training"}
    return Wanted(source=source or find_objective("digits"), kind=kind, settings=settings, given=frozenset(said))


def join(engine, name, *what, allow_code_change=False, **changes):
    return create_or_join(
        engine, name, wanted(*what, **changes), command=f"tuner run {name}", allow_code_change=allow_code_change
    )


@pytest.fixture
def function(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def loss(trial):\n    return trial.suggest_float('x', -1, 1) ** 2\n")
    source = find_objective(f"{path}:loss")
    return source, source.load()


def test_a_plan_takes_what_the_objective_says_where_the_command_says_nothing():
    spec, objective = a_plan(options={"max_units": 128}, seed=9)
    assert (spec.metric, spec.direction, spec.epochs, spec.seed) == ("accuracy", "maximize", 20, 9)
    assert (spec.objective.name, spec.objective.options) == ("digits", {"max_layers": 2, "max_units": 128})
    assert spec.objective.code_hash == find_objective("digits").code_hash()
    assert (objective.max_units, objective.seed) == (128, 9)
    assert a_spec(epochs=3).epochs == 3
    assert a_spec(pruner="hyperband", epochs=7).pruner.settings == {"max_resource": 7}


@pytest.mark.parametrize(
    ("suggest", "last"),
    [
        (lambda trial: trial.suggest_int("epochs", 3, 81, log=True), 81),
        (lambda trial: trial.suggest_categorical("epochs", [3, 27]), 27),
        (lambda trial: trial.suggest_categorical("long", [False, True]) and trial.suggest_int("epochs", 3, 5), 9),
    ],
    ids=["range", "choices", "in one branch"],
)
def test_hyperband_ends_its_brackets_at_the_most_epochs_that_a_trial_may_have(suggest, last):
    class Long(Digits):
        def suggest(self, trial):
            suggest(trial)

    assert a_spec(kind=Long, pruner="hyperband", epochs=9).pruner.settings == {"max_resource": last}
    assert a_spec(kind=Long, pruner="hyperband:max_resource=4", epochs=9).pruner.settings == {"max_resource": 4}


def test_how_samples_are_read_is_what_the_objective_says_where_the_command_says_nothing():
    class Read(Digits):
        readers = 0
        prefetch = 2

    training = a_spec(kind=Read).training
    assert (training.readers, training.prefetch) == (0, 2)
    training = a_spec(kind=Read, training=TrainingSpec(readers=3)).training
    assert (training.readers, training.prefetch) == (3, 2)
    assert a_spec().training == TrainingSpec()
    Read.readers = -1
    with pytest.raises(UsageError, match=r"^Read\.readers: input should be greater than or equal to 0, got -1$"):
        a_spec(kind=Read)


def test_a_plain_function_minimizes_unless_told_otherwise(function):
    spec, objective = a_plan(*function)
    assert (spec.metric, spec.direction, spec.epochs, spec.objective.options) == ("value", "minimize", 1, {})
    assert objective is None
    assert a_plan(*function, direction="maximize")[0].direction == "maximize"


@pytest.mark.parametrize(("trials", "wanted"), [(3, 3), (30, 6)])
def test_a_grid_smaller_than_the_budget_is_the_budget(function, trials, wanted):
    sampler = 'grid:{"search_space": {"x": [-1, 0, 1], "y": [0, 1]}}'
    assert a_plan(*function, sampler=sampler, budget=Budget(trials=trials))[0].budget.trials == wanted


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"options": {"units": 3}}, "--set: Digits has no option 'units'"),
        ({"direction": "minimize"}, "--direction: Digits says maximize, got minimize"),
        ({"sampler": "x"}, "--sampler needs one of"),
        ({"pruner": "x"}, "--pruner needs one of"),
    ],
)
def test_a_plan_that_cannot_work_names_the_option(changes, told):
    with pytest.raises(UsageError) as caught:
        a_plan(**changes)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"options": {"a": 3, "b": 4}}, "--set: the plain function mine.py:loss has no options, got a, b"),
        ({"epochs": 3}, "--epochs: the plain function mine.py:loss trains as long as it likes"),
        (
            {"training": TrainingSpec(cuda_graphs=True)},
            "--cuda-graphs: the plain function mine.py:loss trains as it likes",
        ),
    ],
)
def test_a_plan_of_a_plain_function_takes_no_options_of_objectives(function, changes, told):
    with pytest.raises(UsageError) as caught:
        a_plan(*function, **changes)
    assert told in str(caught.value)


@pytest.mark.slow
def test_a_study_is_opened_with_the_spec_it_was_created_with(engine, database):
    spec = a_spec(
        sampler="grid", pruner="median:n_warmup_steps=3", seed=2**63 - 1, budget=Budget(trials=9, timeout_s=60)
    )
    created = create_study(engine, "digits", spec)
    opened = open_study(engine, "digits")
    assert opened == created
    assert opened.spec == spec
    assert (opened.budget.trials, opened.budget.timeout_s, opened.budget.max_failures) == (9, 60, 10)
    assert opened.budget.max_attempts == 3
    study = optuna.load_study(study_name="digits", storage=open_storage(database))
    assert study.direction.name == "MAXIMIZE"
    assert study.user_attrs == {"objective": "digits", "metric": "accuracy", "epochs": 20, "seed": 2**63 - 1}


@pytest.mark.slow
def test_joining_a_study_takes_what_is_not_given_from_it(engine):
    first = join(engine, "digits", seed=3, sampler="grid", pruner="hyperband", epochs=7, options={"max_units": 128})
    assert first.created
    again = join(engine, "digits")
    assert (again.created, again.study) == (False, first.study)
    budget = Budget(trials=first.study.spec.budget.trials)
    assert join(engine, "digits", budget=budget, given=["trials"], pruner="hyperband").study == first.study


def test_what_is_given_and_differs_is_refused_with_the_command_that_joins(engine):
    join(engine, "digits", seed=4)
    with pytest.raises(TunerError) as caught:
        join(engine, "digits", seed=3, sampler="random")
    assert str(caught.value) == (
        "study 'digits' exists with another spec (sampler.name: the study has tpe, this command says random;"
        " seed: the study has 4, this command says 3);"
        " 'tuner run digits' joins it as it is, --study NAME makes a study of its own"
    )
    with pytest.raises(TunerError, match=r"\(budget\.trials: the study has 30, this command says 9\)"):
        join(engine, "digits", budget=Budget(trials=9, timeout_s=9), given=["trials"])
    with pytest.raises(TunerError, match=r"\(training\.patience: the study has None, this command says 2\)"):
        join(engine, "digits", training=TrainingSpec(patience=2), given=["patience"])
    with pytest.raises(TunerError, match=r"\(objective\.options\.max_units: the study has 512, this command says 9\)"):
        join(engine, "digits", options={"max_units": 9})


def add_trials(engine, study, *states, message="KeyError: 'x' (mine.py, line 2)", kind="user_error"):
    in_optuna = optuna.load_study(study_name=study.name, storage=open_storage(engine.url))
    for state in states:
        attrs = {"failure": kind, "failure_message": message} if state == "FAIL" else {}
        trial = optuna.trial.create_trial(
            state=optuna.trial.TrialState[state], value=1.0 if state == "COMPLETE" else None, user_attrs=attrs
        )
        in_optuna.add_trial(trial)


FIXED = "def loss(trial):\n    return trial.suggest_float('x', -2, 2)\n"


def test_a_study_of_which_nothing_is_complete_is_replaced_once_its_code_is_mended(engine, function):
    source, kind = function
    study = join(engine, "mine", source, kind, direction="maximize").study
    add_trials(engine, study, "FAIL")
    control.enqueue(Sessions(engine), study.study_id, {"x": 0.5})
    old = source.code_hash()
    source.file.write_text(FIXED)
    went_on = join(engine, "mine", source, kind, allow_code_change=True)
    assert went_on.study == study
    anew = join(engine, "mine", source, kind)
    assert (anew.created, anew.replaced) == (True, study)
    assert anew.why == f"objective.code_hash: the study has {old[:12]}, this command says {source.code_hash()[:12]}"
    assert anew.study.spec.direction == "maximize"
    in_optuna = optuna.load_study(study_name="mine", storage=open_storage(engine.url))
    assert [trial.system_attrs["fixed_params"] for trial in in_optuna.trials] == [{"x": 0.5}]
    assert why_failed(engine, anew.study) is None


def test_failures_alike_end_a_study_which_the_same_command_replaces(engine, function):
    study = join(engine, "mine", *function).study
    add_trials(engine, study, "FAIL", "FAIL", message="ValueError: -3 and 4x5e-06 (mine.py, line 2)")
    add_trials(engine, study, "FAIL", message="ValueError: 3 and 4.5 (mine.py, line 3)")
    assert why_failed(engine, study) is None
    add_trials(engine, study, "FAIL", message="ValueError: 7 and 8x9 (mine.py, line 2)")
    assert why_failed(engine, study) == (
        "study 'mine' ended: 3 trials failed alike, and none is complete: ValueError: 7 and 8x9 (mine.py, line 2);"
        " 'tuner trials mine' lists them;"
        " once that is mended, the same 'tuner run' or 'tuner create' replaces the study"
    )
    assert join(engine, "mine", *function, seed=9).replaced == study


@pytest.mark.parametrize("kind", ["nan", "oom", "lost"])
def test_failures_that_other_params_may_not_have_are_not_alike(engine, function, kind):
    study = join(engine, "mine", *function).study
    add_trials(engine, study, *["FAIL"] * 5, kind=kind)
    assert why_failed(engine, study) is None


@pytest.mark.parametrize("states", [["PRUNED"], ["COMPLETE"]])
def test_a_study_of_which_anything_is_done_is_never_replaced(engine, function, states):
    source, kind = function
    study = join(engine, "mine", source, kind).study
    add_trials(engine, study, *["FAIL"] * 4, *states)
    assert why_failed(engine, study) is None
    source.file.write_text(FIXED)
    with pytest.raises(TunerError, match=r"mine\.py is not what .*; --study NAME .*, --allow-code-change goes on"):
        join(engine, "mine", source, kind)
    add_trials(engine, study, *["FAIL"] * 7)
    with pytest.raises(TunerError, match=r"--study NAME starts a study with it$"):  # it would die of its failures
        join(engine, "mine", source, kind)


def test_a_study_that_somebody_runs_is_not_replaced(engine, function):
    source, kind = function
    study = join(engine, "mine", source, kind).study
    claims.claim(Sessions(engine), study.study_id, study.budget, claims.Holder(worker="w"))
    source.file.write_text(FIXED)
    with pytest.raises(TunerError, match="it has changed from"):
        join(engine, "mine", source, kind)
    assert open_study(engine, "mine") == study


def test_a_study_of_another_objective_is_not_replaced(engine, function):
    study = join(engine, "digits").study
    add_trials(engine, study, *["FAIL"] * 3)
    with pytest.raises(TunerError, match=r"objective\.name: the study has digits, this command says mine\.py:loss"):
        join(engine, "digits", *function)


def test_a_study_is_created_once(engine):
    create_study(engine, "digits", a_spec())
    with pytest.raises(StudyExistsError, match="digits"):
        create_study(engine, "digits", a_spec())


@pytest.mark.parametrize("name", ["", "a\0b", "x" * 513])
def test_a_name_that_the_database_cannot_hold_is_a_usage_error(engine, name):
    with pytest.raises(UsageError, match="a study's name needs 1 to"):
        join(engine, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits; drop table studies", "'", "ümläut 🔥", "../../etc", "%s"])
def test_any_other_name_is_only_a_name(engine, name):
    assert join(engine, name).study == open_study(engine, name)


def test_a_study_that_is_not_there_is_told_with_advice(engine):
    with pytest.raises(StudyNotFoundError, match=r"no study named 'fmnist' in .*; 'tuner studies' lists them"):
        open_study(engine, "fmnist")


def test_a_study_of_another_program_is_refused(engine, database):
    optuna.create_study(study_name="notebook", storage=open_storage(database))
    with pytest.raises(TunerError, match="study 'notebook' has no spec: it was not created by tuner"):
        open_study(engine, "notebook")


def test_other_code_is_refused_with_both_hashes_unless_allowed(engine, function):
    source, _ = function
    study = create_study(engine, "mine", a_plan(*function)[0])
    check_code(study, source, allow_code_change=False)
    before = source.code_hash()
    source.file.write_text(textwrap.dedent("def loss(trial): return 1"))
    check_code(study, source, allow_code_change=True)
    with pytest.raises(TunerError) as caught:
        check_code(study, source, allow_code_change=False)
    for part in (before[:12], source.code_hash()[:12], str(source.file), "--allow-code-change"):
        assert part in str(caught.value)


@pytest.mark.parametrize("allow_code_change", [True, False])
def test_another_objective_is_refused_in_any_case(engine, function, allow_code_change):
    study = create_study(engine, "digits", a_spec())
    with pytest.raises(TunerError, match=r"searches objective 'digits', got 'mine.py:loss'"):
        check_code(study, function[0], allow_code_change=allow_code_change)


def test_a_study_without_a_complete_trial_has_no_best_one(engine, database):
    study = create_study(engine, "digits", a_spec())
    with pytest.raises(TunerError, match=r"study 'digits' has no complete trial yet; 'tuner status digits' shows"):
        best_of(engine, study)
    in_optuna = optuna.load_study(study_name="digits", storage=open_storage(database))
    for value in (0.5, 0.9, 0.9, 0.1):
        in_optuna.add_trial(optuna.trial.create_trial(value=value))
    assert (best_of(engine, study).number, best_of(engine, study).value) == (1, 0.9)


@pytest.mark.parametrize(
    ("budget", "told"),
    [
        ({"trials": 50}, "'tuner extend s --trials +20' adds to it"),
        ({"trials": 1}, "--trials 30 joins it"),
        (
            {"trials": 31, "timeout_s": 7200.0, "max_failures": 3},
            "'tuner extend s --trials +1 --timeout 7200s' adds to it, --max-failures 10 joins it",
        ),
    ],
)
def test_to_join_with_another_budget_is_refused_with_the_command_that_extends(engine, budget, told):
    join(engine, "s", budget=Budget(trials=30, timeout_s=60.0), given=["trials", "timeout_s"])
    with pytest.raises(TunerError) as caught:
        join(engine, "s", budget=Budget(**budget), given=list(budget))
    assert str(caught.value).startswith("study 's' exists with another budget (budget.")
    assert str(caught.value).endswith(f"; {told}")


def test_past_trials_are_read_to_create_a_study_and_not_to_join_it(engine):
    read = []

    def history():
        read.append(1)
        return []

    command = {"command": "tuner run s", "history": history}
    for _ in range(2):
        create_or_join(engine, "s", wanted(history="other"), **command)
    assert read == [1]
    assert not create_or_join(engine, "s", wanted(), **command).created
    with pytest.raises(TunerError, match="history: the study has other, this command says another"):
        create_or_join(engine, "s", wanted(history="another"), **command)
    add_trials(engine, create_or_join(engine, "s", wanted(), **command).study, "COMPLETE", *["FAIL"] * 11)
    read.clear()
    create_or_join(engine, "s", wanted(history="other"), **command)  # ended by its failures, and stays
    assert read == []
