"""optuna-dashboard, served to those who may ask.

In come a storage, an address and a token. Out go pages, behind a guard that settles who may ask, from where, and for
what.
"""
