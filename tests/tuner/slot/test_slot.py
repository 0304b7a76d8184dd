import pytest

from storage import PostgresStorage
from storage.optuna_storage.pruning import IndexedPercentilePruner
from tuner.errors import UsageError
from tuner.slot.slot import pruner_on
from tuner.spec import PrunerSpec
from tuner.study.sampling import build_pruner, pruner_spec


@pytest.fixture
def storage():
    """A storage that nothing connects."""
    storage = PostgresStorage("postgresql://nobody@localhost:1/none")
    yield storage
    storage.engine.dispose()


@pytest.mark.parametrize(
    "text",
    [
        "median",
        "median:n_startup_trials=1,n_warmup_steps=2,interval_steps=3,n_min_trials=4",
        "percentile",
        "percentile:percentile=10.0,n_startup_trials=0,n_min_trials=2",
    ],
)
def test_median_and_percentile_are_decided_from_an_index_with_the_specs_settings(storage, text):
    spec = pruner_spec(text, epochs=20)
    ours = pruner_on(storage, 1, spec)
    assert isinstance(ours, IndexedPercentilePruner)
    assert vars(ours).items() >= vars(build_pruner(spec)).items()


@pytest.mark.parametrize("name", ["hyperband", "asha", "none"])
def test_the_other_pruners_are_optunas(storage, name):
    spec = pruner_spec(name, epochs=20)
    assert type(pruner_on(storage, 1, spec)) is type(build_pruner(spec))


def test_a_setting_that_the_pruner_does_not_have_is_refused(storage):
    with pytest.raises(UsageError, match="--pruner median has no setting 'percentile'"):
        pruner_on(storage, 1, PrunerSpec(name="median", settings={"percentile": 10.0}))
