"""Searches replayed on recorded learning curves: which rule finds a better model in the same device time."""
