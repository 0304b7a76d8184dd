"""Objectives that come with tuner, one module each. `tuner objectives` lists them."""
