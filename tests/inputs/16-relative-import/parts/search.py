from .limits import HIGH, LOW


def objective(trial):
    return trial.suggest_int("x", LOW, HIGH)
