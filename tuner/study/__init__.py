"""What a study is: its objective found, its spec made and stored, its sampler and pruner built, its state told.

In come an objective's name or file, the options of a search, and a database. Out go a checked spec, the study that was
created or joined with it, what every worker needs to search it alike, and how it stands. Importing it costs no torch.
"""
