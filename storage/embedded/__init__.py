"""A PostgreSQL server for people who have none: programs out of a wheel, a cluster in the data directory.

In comes a data directory. Out goes the URL of a server that all processes of its user share, started by the first one
that needs it and ended once nobody does; nothing here knows what is stored in it.
"""
