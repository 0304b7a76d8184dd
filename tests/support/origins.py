"""Studies in other storages of Optuna's, and importing them."""

import datetime as dt
import math
from contextlib import contextmanager

import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState, create_trial

from storage import open_storage
from storage.importing.sources import open_source
from storage.importing.studies import import_studies

SPACE = {
    "lr": FloatDistribution(1e-5, 1.0, log=True),
    "momentum": FloatDistribution(0.0, 1.0, step=0.25),
    "units": IntDistribution(8, 64, log=True),
    "layers": IntDistribution(1, 9, step=2),
    "kind": CategoricalDistribution([None, True, 1, "a", 2.5]),
}
PARAMS = {"lr": 0.1 + 0.2, "momentum": 0.75, "units": 17, "layers": 3}
LATE, EARLY = dt.datetime(2026, 3, 29, 1, 30, 0, 123456), dt.datetime(2020, 10, 25, 2, 30)


class Origin:
    """A storage of Optuna's to import from, and how to name it."""

    def __init__(self, url, storage):
        self.url = url
        self.storage = storage

    def study(self, name="s", directions=("minimize",)):
        return optuna.create_study(study_name=name, storage=self.storage, directions=list(directions))


@contextmanager
def an_rdb(url):
    storage = RDBStorage(url)
    try:
        yield Origin(url, storage)
    finally:
        storage.remove_session()
        storage.engine.dispose()


def a_journal(path):
    return Origin(str(path), JournalStorage(JournalFileBackend(str(path))))


def imported(origin, target, *names, **options):
    with open_source(origin.url) as source:
        return import_studies(source, target, names=names, **options)


def here(target, name="s"):
    """What our storage reads of a study."""
    storage = open_storage(target.url)
    try:
        study_id = storage.get_study_id_from_name(name)
        (study,) = [study for study in storage.get_all_studies() if study.study_name == name]
        return study, storage.get_all_trials(study_id)
    finally:
        storage.engine.dispose()


def set_up_every_kind(origin):
    study = origin.study("née 'x'; --", ("minimize", "maximize"))
    origin.storage.set_study_system_attr(study._study_id, "study:metric_names", ["loss", "size"])
    study.set_user_attr("nested", {"a": [1, None, math.inf]})
    for kind in SPACE["kind"].choices:
        study.add_trial(
            create_trial(
                values=[math.inf, -0.1],
                params={**PARAMS, "kind": kind},
                distributions=SPACE,
                user_attrs={"é": {"list": [1, None, "\0"]}},
                system_attrs={"note": "x" * 3000},
                intermediate_values={0: math.nan, 7: math.inf, 3: -math.inf, 2**31 - 1: 0.1},
            )
        )
    # As suggest_categorical writes it, and create_trial cannot: of equal choices not the first one.
    trial_id = origin.storage.create_new_trial(study._study_id)
    origin.storage.set_trial_param(trial_id, "kind", 2.0, SPACE["kind"])
    origin.storage.set_trial_state_values(trial_id, TrialState.COMPLETE, [0.0, 0.0])
    for state in (TrialState.PRUNED, TrialState.FAIL, TrialState.WAITING):
        study.add_trial(create_trial(state=state, intermediate_values={1: 0.5}))
    trial = create_trial(values=[1.0, 2.0])
    trial.datetime_start, trial.datetime_complete = EARLY, LATE
    study.add_trial(trial)
    study.enqueue_trial({"lr": 0.5})
    return study
