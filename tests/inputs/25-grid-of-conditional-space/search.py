"""A param that one value of another asks for."""

from tuner.objective import Objective


class Space(Objective):
    """Is searched by nobody: what is wrong with it shows when it is created."""

    def suggest(self, trial):
        trial.suggest_int("layers", 1, 2)
        if trial.suggest_categorical("norm", ["none", "batch", "group"]) == "group":
            trial.suggest_categorical("groups", [2, 4])

    def load_data(self, root):
        raise NotImplementedError

    def build_model(self, params):
        raise NotImplementedError
