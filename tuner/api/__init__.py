"""What a command does, as one function that Python calls as well: a study made, run, read and exported.

Settings and words come in; what was made goes out. Nothing here parses arguments or prints.
"""
