"""A function that ends its search when it has found enough, and goes on with its trial."""


def enough(trial):
    x = trial.suggest_float("path", 0, 1)
    if trial.number == 1:
        trial.study.stop()
    for step in range(3):
        trial.report(x, step)
    return x
