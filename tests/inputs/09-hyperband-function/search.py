"""A plain function that reports more steps than it says beforehand."""


def curve(trial):
    end = trial.suggest_float("end", 0, 1)
    for step in range(27):
        trial.report(end + 0.5**step, step)
    return end
