"""Params, and lines that it prints, in letters that ASCII has not."""


def objective(trial):
    print("prüft", trial.number)
    return len(trial.suggest_categorical("straße", ["weiß"]))
