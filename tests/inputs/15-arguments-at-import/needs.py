import argparse

parser = argparse.ArgumentParser()
parser.add_argument("rows")
given = parser.parse_args()


def objective(trial):
    return trial.suggest_int("x", 0, 0)
