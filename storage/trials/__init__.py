"""The rows of trials: creating, reading and changing them, whoever asks.

In come a trial's ids, values and, for a trial that is leased, the token of its lease. Out go Optuna's FrozenTrials,
an index of what finished trials reported, and writes of one statement that change nothing of a trial that has ended
or is somebody else's.
"""
