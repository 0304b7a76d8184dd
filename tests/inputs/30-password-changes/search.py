import threading


def objective(trial):
    width = trial.suggest_float("width", 1, 2)
    for step in range(1, 25):
        threading.Event().wait(0.2)
        trial.report(width, step)
    return width
