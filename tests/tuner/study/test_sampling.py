import itertools
import json
import math
import re
from decimal import Decimal

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState
from searching import SCALARS, Untrained

from storage.optuna_storage.rules import Rungs
from tuner.errors import UsageError
from tuner.spec import PrunerSpec
from tuner.study.sampling import (
    _PRUNERS,
    _SAMPLERS,
    _grid_values,
    build_pruner,
    build_sampler,
    discover,
    grid_size,
    pruner_spec,
    random_start,
    sampler_spec,
    suited,
)
from tuner.study.settings import NOT_SETTABLE, RANGES, parameters_of

SAMPLERS = ("tpe", "random", "gp", "cmaes", "qmc", "grid")
PRUNERS = ("median", "percentile", "rungs", "hyperband", "asha", "none")


class Flat(Untrained):
    def suggest(self, trial):
        trial.suggest_float("lr", 1e-4, 1e-1, log=True)
        trial.suggest_int("units", 16, 64, step=16)
        trial.suggest_categorical("activation", ["relu", "gelu"])


class Conditional(Untrained):
    def suggest(self, trial):
        for layer in range(trial.suggest_int("layers", 1, 2)):
            trial.suggest_int(f"units_{layer}", 8, 16, log=True)
        if trial.suggest_categorical("optimizer", ["adam", "sgd"]) == "sgd":
            if trial.suggest_categorical("schedule", ["none", "cosine"]) == "cosine":
                trial.suggest_float("floor", 0.0, 0.1)
        else:
            trial.suggest_float("beta", 0.8, 0.99)


@pytest.fixture(params=[Flat, Conditional], ids=lambda space: space.__name__.lower())
def space(request):
    return request.param()


def loss_of(params):
    """A loss that every param moves, so that samplers that learn have something to learn."""
    return sum(value if isinstance(value, int | float) else len(str(value)) for value in params.values())


def run_trials(space, spec, count, *, seed=3, study=None, workers=2, pruner=None):
    """Run trials as workers do: each with objects of its own on one storage, a new sampler for each trial."""
    study = study or optuna.create_study()
    pruners = [build_pruner(pruner or PrunerSpec(name="none")) for _ in range(workers)]
    for index in range(count):
        own = optuna.load_study(study_name=study.study_name, storage=study._storage, pruner=pruners[index % workers])
        own.sampler = build_sampler(spec, seed, len(study.trials))
        trial = own.ask()
        space.suggest(trial)
        loss = loss_of(trial.params)
        pruned = False
        for step in range(1, 9 if pruner else 1):
            trial.report(loss / step, step)
            pruned = trial.should_prune()
            if pruned:
                break
        own.tell(trial, None if pruned else loss, TrialState.PRUNED if pruned else TrialState.COMPLETE)
    return study


def drawn(study):
    return [trial.params for trial in study.trials]


@pytest.fixture(autouse=True)
def optuna_says_warnings_only(caplog):
    """What Optuna logs at the level that slots run with is what people would see."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    optuna.logging.enable_propagation()
    yield
    optuna.logging.disable_propagation()
    # The GP sampler says once a process that it is slower without greenlet, which is true.
    said = [record.getMessage() for record in caplog.get_records("call") if "greenlet" not in record.getMessage()]
    assert said == []


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_gives_the_same_params_for_the_same_seed_number_and_history(space, name):
    spec = sampler_spec(name, space)
    study = run_trials(space, spec, 12)
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 12
    assert drawn(run_trials(space, spec, 12, workers=3)) == drawn(study)
    assert len({json.dumps(params) for params in drawn(study)}) > 6


@pytest.mark.parametrize("name", SAMPLERS)
def test_another_study_seed_gives_other_params(name):
    # An unscrambled QMC sequence is always the same, but for its first point.
    settings = ":scramble=true" if name == "qmc" else ""
    spec = sampler_spec(name + settings, Flat())
    assert drawn(run_trials(Flat(), spec, 4, seed=3)) != drawn(run_trials(Flat(), spec, 4, seed=4))


@pytest.mark.parametrize("name", SAMPLERS)
def test_trials_that_start_at_the_same_time_get_different_params(name):
    spec = sampler_spec(name, Flat())
    study = optuna.create_study()
    for number in range(4):  # none has ended when the next one starts
        study.sampler = build_sampler(spec, 3, number)
        Flat().suggest(study.ask())
    assert len({json.dumps(params) for params in drawn(study)}) == 4


@pytest.mark.parametrize("name", ["gp", "cmaes", "qmc", "tpe"])
def test_params_that_a_sampler_draws_by_chance_differ_from_trial_to_trial(name):
    class Late(Untrained):
        def suggest(self, trial):
            trial.suggest_float("x", 0, 1)
            trial.suggest_float("y", 0, 1)
            if trial.number:  # not in the first trial, so not in the space that is searched as a whole
                trial.suggest_float("late", 0, 1)

    spec = sampler_spec(name, Late())
    late = [params["late"] for params in drawn(run_trials(Late(), spec, 8))[1:]]
    assert len(set(late)) == 7


def test_qmc_takes_each_point_of_its_sequence_once_also_where_workers_read_before_others_write():
    spec = sampler_spec("qmc", Flat())
    study = run_trials(Flat(), spec, 1)
    workers = [optuna.load_study(study_name=study.study_name, storage=study._storage) for _ in range(8)]
    waiting = []
    for number, worker in enumerate(workers, 1):
        worker.sampler = build_sampler(spec, 3, number)
        waiting.append(worker.ask())
    for trial in reversed(waiting):
        Flat().suggest(trial)
    one_after_another = run_trials(Flat(), spec, 9)
    assert drawn(study) == drawn(one_after_another)


def test_a_grid_covers_each_cell_once():
    spec = sampler_spec("grid", Flat())
    assert grid_size(spec) == 4 * 4 * 2
    study = run_trials(Flat(), spec, 32, workers=3)
    cells = {tuple(sorted(params.items())) for params in drawn(study)}
    values = [sorted(spec.settings["search_space"][name], key=str) for name in ("activation", "lr", "units")]
    wanted = itertools.product(*values)
    assert cells == {tuple(zip(("activation", "lr", "units"), cell, strict=True)) for cell in wanted}


def test_a_grid_of_a_conditional_space_covers_every_branch():
    spec = sampler_spec("grid:points=2", Conditional())
    size = grid_size(spec)
    assert size == (2 + 2**2) * (1 + 2 + 2)
    study = run_trials(Conditional(), spec, size, workers=3)
    branches = {tuple(params) for params in drawn(study)}
    assert len(branches) == 2 * 3
    assert len({json.dumps(params) for params in drawn(study)}) == size


class Both(Untrained):
    """A param that two others lead to together, which no value of one alone shows."""

    def suggest(self, trial):
        ends = [trial.suggest_categorical(name, ["a", "b"]) for name in ("left", "right")]
        if ends == ["b", "b"]:
            trial.suggest_int("both", 1, 3)
        if ends == ["b", "a"]:
            raise optuna.TrialPruned


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("grid", 3 + 3),
        ('grid:{"search_space": {"left": ["a", "b"], "right": ["a", "b"], "both": [1, 2.0]}}', 3 + 2),
        ('grid:{"search_space": {"left": ["b"], "right": ["b"], "both": [3], "never": [1, 2]}}', 1),
    ],
)
def test_a_cell_of_a_grid_counts_once_whatever_is_not_suggested_there(text, size):
    spec = sampler_spec(text, Both())
    assert grid_size(spec) == size
    assert len({json.dumps(cell) for cell in spec.settings["cells"]}) == size


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('grid:{"search_space": {"lr": [0.1], "units": [16]}}', "grid needs values for activation, which the"),
        ('grid:{"search_space": {"lr": [0.1], "units": [16.5], "activation": ["gelu"]}}', "units: 16 to 64 in steps"),
        ('grid:{"search_space": {"lr": [0.1], "units": [16], "activation": ["gel"]}}', "relu or gelu; got 'gel'"),
        ("grid:cells=3", "no setting 'cells'; it has: search_space, points"),
    ],
)
def test_a_grid_that_does_not_fit_the_objective_is_refused_by_name(text, told):
    with pytest.raises(UsageError) as refused:
        sampler_spec(text, Flat())
    assert told in str(refused.value)


def test_a_grid_s_values_are_written_as_their_params_types():
    spec = sampler_spec('grid:{"search_space": {"lr": [1], "units": ["32"], "activation": ["gelu"]}}', Flat())
    assert json.dumps(spec.settings) == '{"search_space": {"lr": [1.0], "units": [32], "activation": ["gelu"]}}'


class _Broken(Untrained):
    at: str

    def suggest(self, trial):
        if trial.suggest_categorical("optimizer", ["adam", "sgd"]) == self.at:
            trial.suggest_float("momentum", 0.0, 0.9, log=True)


@pytest.mark.parametrize("branch", ["adam", "sgd"])
def test_a_space_that_cannot_be_is_told_with_its_line_in_whichever_branch(branch):
    with pytest.raises(UsageError) as refused:
        discover(_Broken(at=branch))
    told = str(refused.value)
    assert told.startswith("_Broken.suggest failed: ValueError: `low > 0` must hold")
    line = _Broken.suggest.__code__.co_firstlineno + 2
    assert told.endswith(f"({__file__}, line {line})")


def test_no_other_sampler_has_an_end():
    assert [grid_size(sampler_spec(name, Flat())) for name in SAMPLERS[:-1]] == [None] * 5


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["tpe", "random"])
@pytest.mark.parametrize("name", PRUNERS)
def test_a_pruner_ends_what_is_worse_and_spares_the_best(name, sampler):
    spec = pruner_spec({"median": "median:n_startup_trials=2", "asha": "asha:min_resource=1"}.get(name, name), 8)
    study = run_trials(Flat(), sampler_spec(sampler, Flat()), 24, pruner=spec)
    pruned = [trial for trial in study.trials if trial.state == TrialState.PRUNED]
    assert bool(pruned) == (name != "none")
    assert study.best_trial.state == TrialState.COMPLETE
    assert all(study.best_value <= loss_of(trial.params) for trial in pruned) or name in {"hyperband", "asha"}


def test_hyperband_ends_at_the_epochs_of_the_study_unless_told_otherwise():
    assert pruner_spec("hyperband", 20).settings == {"max_resource": 20}
    assert pruner_spec("hyperband:max_resource=9", 20).settings == {"max_resource": 9}


def test_tpe_learns_from_fewer_trials_beside_rungs_unless_told_otherwise():
    rungs, median = pruner_spec("rungs", 20), pruner_spec("median", 20)
    assert suited(sampler_spec("tpe", None), rungs).settings == {"gamma": "sqrt"}
    given = sampler_spec("tpe:gamma=linear,group=true", None)
    assert suited(given, rungs) == given
    assert suited(sampler_spec("tpe", None), median).settings == {}
    assert suited(sampler_spec("random", None), rungs).settings == {}


def test_rungs_are_of_the_study_s_epochs_and_a_plain_function_tells_its_own():
    assert pruner_spec("rungs", 20).settings == {"epochs": 20}
    spec = pruner_spec("rungs:epochs=60,eta=4", None)
    assert build_pruner(spec).rule == Rungs((5, 17), 4, n_startup=3, latest=6)
    assert build_pruner(spec, trials=5).rule.n_startup == 1
    with pytest.raises(UsageError, match="--pruner rungs needs to know how often a plain function's trial reports"):
        pruner_spec("rungs:eta=4", None)


@pytest.mark.parametrize(
    ("text", "stock"),
    [
        ("hyperband", optuna.pruners.HyperbandPruner),
        ("asha", optuna.pruners.SuccessiveHalvingPruner),
    ],
)
def test_a_plain_function_s_steps_are_found_as_optuna_finds_them(text, stock):
    steps = []
    for pruner in (build_pruner(pruner_spec(text, None)), stock()):
        study = optuna.create_study(study_name="s", sampler=optuna.samplers.RandomSampler(0), pruner=pruner)
        study.optimize(reporting, n_trials=40)
        steps.append([trial.last_step for trial in study.trials])
    assert steps[0] == steps[1]
    assert len(set(steps[0])) > 2


def reporting(trial):
    x = trial.suggest_float("x", 0, 1)
    for step in range(1, 82):
        trial.report(x + 1 / step, step)
        if trial.should_prune():
            raise optuna.TrialPruned
    return x


def test_median_pruning_is_what_optuna_has_by_default():
    pruner = build_pruner(pruner_spec("median:n_warmup_steps=3,interval_steps=2", 20))
    assert (pruner._n_startup_trials, pruner._n_warmup_steps, pruner._interval_steps) == (5, 3, 2)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("annealing", "--sampler needs one of tpe, random, gp, cmaes, qmc, grid, got 'annealing'"),
        ("", "got ''"),
        ("tpe:n_startup", "settings of 'tpe' need to be KEY=VALUE,KEY=VALUE or JSON, got 'n_startup'"),
        ("tpe:=3", "KEY=VALUE"),
        ("tpe:n_startup_trials=3,,", "KEY=VALUE"),
        ('tpe:{"n_startup_trials": }', "settings of 'tpe' need to be JSON"),
        ("tpe:n_startup=3", "--sampler tpe has no setting 'n_startup'; it has: "),
        ("tpe:seed=3", "--sampler tpe has no setting 'seed'"),
        ("random:x=1", "--sampler random has no setting 'x'; it has: none"),
        ("qmc:x=1", "--sampler qmc has no setting 'x'; it has: qmc_type, scramble"),
        ("tpe:gamma=3", "gamma needs to be str, got 3"),
        ("tpe:gamma=cubic", "gamma needs to be linear or sqrt, got 'cubic'"),
        ("qmc:others=3", "no setting 'others'; it has: qmc_type, scramble"),
        ("qmc:qmc_type=grid", "--sampler qmc does not take these settings"),
        ("qmc:number=3", "no setting 'number'"),
        ("tpe:n_ei_candidates=0", "--sampler tpe: n_ei_candidates needs to be within 1 to 1000000, got 0"),
        ("gp:n_startup_trials=-1", "--sampler gp: n_startup_trials needs to be at least 0, got -1"),
        ("cmaes:inc_popsize=2", "--sampler cmaes has no setting 'inc_popsize'"),
        ('cmaes:{"x0": {"lr": 0.01}}', "x0 needs a value for units too"),
        ('cmaes:{"x0": {"lr": 0.01, "units": 32, "depth": 2}}', "x0 has 'depth'; the numbers to search are: lr, units"),
        ('cmaes:{"x0": {"lr": 1, "units": 32}}', "x0: lr: 0.0001 to 0.1, log; got 1"),
        ("grid:points=0", "points to be a whole number in 1..1000, got 0"),
        ("grid:points=true", "points to be a whole number in 1..1000, got True"),
        ("grid:points=many", "got 'many'"),
        ("grid:search_space=3", "needs a search_space such as"),
        ('grid:{"search_space": {}}', "needs a search_space such as"),
        ('grid:{"search_space": {"lr": 0.1}}', "needs a list of values for 'lr', got 0.1"),
        ('grid:{"search_space": {"lr": []}}', "needs a list of values for 'lr', got []"),
        ('grid:{"search_space": {"lr": [[1]]}}', "needs a list of values for 'lr', got [[1]]"),
    ],
)
def test_a_sampler_that_cannot_work_is_refused_with_advice(text, told):
    with pytest.raises(UsageError) as caught:
        sampler_spec(text, Flat())
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("hedge", "--pruner needs one of median, percentile, rungs, hyperband, asha, none, got 'hedge'"),
        ("median:warmup=3", "--pruner median has no setting 'warmup'; it has: n_startup_trials, n_warmup_steps"),
        ("median:n_warmup_steps=-1", "--pruner median: n_warmup_steps needs to be at least 0, got -1"),
        ("percentile:percentile=200", "--pruner percentile: percentile needs to be within 0 to 100, got 200"),
        ("median:n_startup_trials=many", "--pruner median: n_startup_trials needs to be int, got 'many'"),
        ("median:n_startup_trials=1.5", "--pruner median: n_startup_trials needs to be int, got 1.5"),
        ("hyperband:reduction_factor=0", "--pruner hyperband: reduction_factor needs to be at least 2, got 0"),
        ("hyperband:min_resource=30", "--pruner hyperband: min_resource needs to be at most max_resource, 20, got 30"),
        ("hyperband:max_resource=soon", "--pruner hyperband does not take these settings"),
        ("rungs:steps=3", "--pruner rungs has no setting 'steps'; it has: epochs, eta"),
        ("rungs:trials=9", "--pruner rungs has no setting 'trials'; it has: epochs, eta"),
        ("rungs:eta=1", "--pruner rungs: eta needs to be at least 1.1, got 1"),
        ("rungs:epochs=0", "--pruner rungs: epochs needs to be at least 1, got 0"),
        ("none:x=1", "it has: none"),
    ],
)
def test_a_pruner_that_cannot_work_is_refused_with_advice(text, told):
    with pytest.raises(UsageError) as caught:
        pruner_spec(text, 20)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


SETTINGS = [
    (name, key)
    for name, kind in {**_SAMPLERS, **_PRUNERS}.items()
    for key, parameter in parameters_of(kind).items()
    if key not in NOT_SETTABLE and re.search(r"\b(int|float)\b", str(parameter.annotation))
]


@pytest.mark.parametrize(("name", "key"), SETTINGS)
def test_a_setting_works_at_the_lower_end_of_its_range_and_is_refused_below(name, key, recwarn):
    low, _ = RANGES[key]

    def specs(value):
        settings = {"n_startup_trials": 1} if name in ("tpe", "gp", "cmaes") else {}
        text = f"{name}:{json.dumps({**settings, key: value})}"
        if name in PRUNERS:
            return sampler_spec("random", Flat()), pruner_spec(text, 8)
        return sampler_spec(text, Flat()), None

    with pytest.raises(UsageError, match=f"{name}: {key} needs to be (within|at least) {low}"):
        specs(low - 1)
    sampler, pruner = specs("auto" if key == "min_resource" and name == "asha" else low)
    study = run_trials(Flat(), sampler, 4, pruner=pruner, workers=1)
    assert {trial.state for trial in study.trials} <= {TrialState.COMPLETE, TrialState.PRUNED}


def test_a_grid_of_a_plain_function_needs_its_values():
    with pytest.raises(UsageError, match="needs the values of a plain function's params, such as"):
        sampler_spec("grid", None)
    assert grid_size(sampler_spec('grid:{"search_space": {"lr": [0.1, 0.01], "n": [1, 2, 3]}}', None)) == 6


def test_every_param_of_a_conditional_space_is_discovered():
    found = discover(Conditional())
    assert sorted(found) == ["beta", "floor", "layers", "optimizer", "schedule", "units_0", "units_1"]
    assert found["floor"] == FloatDistribution(0.0, 0.1)


def test_discovering_leaves_optunas_log_level_as_it_was(capfd):
    optuna.logging.set_verbosity(optuna.logging.INFO)
    discover(Flat())
    assert optuna.logging.get_verbosity() == optuna.logging.INFO
    assert capfd.readouterr() == ("", "")


def stepped(tenths, count, step):
    return FloatDistribution(tenths / 10, float(Decimal(tenths) / 10 + count * Decimal(step)), step=float(step))


DISTRIBUTIONS = (
    st.builds(CategoricalDistribution, st.lists(SCALARS.filter(lambda value: value == value), min_size=1, max_size=5))
    | st.builds(lambda low, n: IntDistribution(low, low + n), st.integers(-99, 99), st.integers(0, 200))
    | st.builds(
        lambda low, n, step: IntDistribution(low, low + n * step, step=step),
        st.integers(-99, 99),
        st.integers(0, 99),
        st.integers(1, 9),
    )
    | st.builds(lambda low, n: IntDistribution(low, low + n, log=True), st.integers(1, 99), st.integers(0, 999))
    | st.builds(lambda low, n: FloatDistribution(low, low + n), st.floats(-1e6, 1e6), st.floats(0, 1e6))
    | st.builds(lambda low, n: FloatDistribution(low, low * n, log=True), st.floats(1e-9, 1e3), st.floats(1, 1e6))
    | st.builds(stepped, st.integers(-99, 99), st.integers(0, 20), st.sampled_from(["0.1", "0.25", "0.3", "1"]))
)


@given(DISTRIBUTIONS, st.integers(1, 9))
def test_a_grid_has_values_of_the_distribution_each_once_and_its_ends(distribution, points):
    values = _grid_values(distribution, points)
    for value in values:
        assert distribution._contains(distribution.to_internal_repr(value)), value
    if isinstance(distribution, CategoricalDistribution):
        assert values == list(distribution.choices)
        return
    assert values == sorted(set(values))
    assert 1 <= len(values) <= points
    assert values[0] == distribution.low
    assert points == 1 or math.isclose(values[-1], distribution.high, rel_tol=1e-9, abs_tol=1e-9)


@pytest.mark.parametrize(
    ("distribution", "values"),
    [
        (FloatDistribution(0.0, 0.3, step=0.1), [0.0, 0.1, 0.2, 0.3]),
        (FloatDistribution(0.0, 1.0, step=0.1), [0.0, 0.3, 0.7, 1.0]),
        (FloatDistribution(1.0, 1.0), [1.0]),
        (FloatDistribution(1e-4, 1e-1, log=True), [1e-4, 1e-3, 1e-2, 1e-1]),
        (IntDistribution(1, 3), [1, 2, 3]),
        (IntDistribution(0, 99), [0, 33, 66, 99]),
        (IntDistribution(16, 64, step=16), [16, 32, 48, 64]),
        (IntDistribution(64, 512, log=True), [64, 128, 256, 512]),
    ],
)
def test_a_continuous_range_is_cut_into_four_values(distribution, values):
    assert _grid_values(distribution, 4) == pytest.approx(values)


@pytest.mark.parametrize(
    ("text", "drawn"), [("tpe", 10), ("tpe:n_startup_trials=3", 3), ("cmaes", 1), ("random", 0), ("qmc", 0)]
)
def test_a_sampler_says_how_many_trials_it_draws_at_random_first(text, drawn):
    assert random_start(sampler_spec(text, None)) == drawn
