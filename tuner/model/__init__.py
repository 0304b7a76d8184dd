"""From a study to a model: the best trial retrained, tested once and exported, and an export loaded again and used.

In comes a study with a complete trial, or the directory of an export and rows for it. Out goes a directory that takes
the place of an earlier one as a whole, or the model of one and what it predicts, without anything unpickled.
"""
