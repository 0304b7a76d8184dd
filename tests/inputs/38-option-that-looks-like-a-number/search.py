"""An option that wants text, and gets what could be a number."""

from tuner.objective import Objective


class Space(Objective):
    """Takes the name of a release."""

    release: str = "none"

    def suggest(self, trial):
        trial.suggest_float("lr", 0.01, 0.1)

    def load_data(self, root):
        raise NotImplementedError

    def build_model(self, params):
        raise NotImplementedError
