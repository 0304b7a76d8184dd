def objective(trial):
    trial.set_user_attr("losses", [step / 3 for step in range(20_000)])
    return trial.suggest_float("width", 1, 2)
