"""Optuna's storage contract on PostgreSQL, rules of pruning, and pruners that decide from an index.

In come the calls that Optuna makes of a storage, and leases that the caller holds. Out go Optuna's studies and trials,
with finished trials read once; `opening` makes such a storage of a URL.
"""
