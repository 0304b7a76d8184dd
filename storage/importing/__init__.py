"""Studies of other Optuna storages, brought into ours.

In come the URL of a source - SQLite, MySQL, PostgreSQL, a journal file - which is only read, and the engine of our
database. Out go the same studies in our tables, and a word on each; what is imported again is brought up to date.
"""
