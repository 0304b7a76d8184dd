"""The author's own, of a name that a package of tuner's has."""


def offset():
    return 2.0
