"""One worker: the process that supervises the slots of a machine, each a process of its own, and runs no trial.

In come a study, the slots that were asked for, and signals. Out go slots that are started, let claim, given up and
started again, a presence in the database, and progress for people.
"""
