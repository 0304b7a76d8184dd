"""One fails in its own code where no trial is about; both have an option that is text."""

from tuner.objective import Objective


class Raises(Objective):
    title: str = "none"

    def suggest(self, trial):
        trial.suggest_int("depth", 1, 2)
        return 1 // 0

    def load_data(self, root): ...

    def build_model(self, params): ...


class Titled(Raises):
    def suggest(self, trial):
        trial.suggest_int("depth", 1, 2)
