"""From a study to a model: the best trial retrained, tested once and exported, and an export loaded again.

In comes a study with a complete trial, or the directory of an export. Out goes a directory of files whose manifest is
in it, or the model of one, without anything unpickled.
"""
