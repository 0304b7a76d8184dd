"""Whole numbers of which a float holds some."""

from tuner.objective import Objective


class Space(Objective):
    """Is searched by nobody: what is wrong with it shows when it is created."""

    def suggest(self, trial):
        trial.suggest_int("key", 0, 2**60)

    def load_data(self, root):
        raise NotImplementedError

    def build_model(self, params):
        raise NotImplementedError
