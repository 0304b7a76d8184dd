"""A branch of the space that Optuna refuses."""

from tuner.objective import Objective


class Space(Objective):
    """Is searched by nobody: what is wrong with it shows when it is created."""

    def suggest(self, trial):
        if trial.suggest_categorical("schedule", ["constant", "step"]) == "step":
            trial.suggest_int("every", 8, 2)

    def load_data(self, root):
        raise NotImplementedError

    def build_model(self, params):
        raise NotImplementedError
