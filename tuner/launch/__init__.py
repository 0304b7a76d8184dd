"""Engines that place workers on machines: SLURM, Ray, Kubernetes, a file each.

In come a study and what its workers are to have; what cannot work is refused before anything is submitted. Out go
jobs of the engine, each a `tuner worker` that the engine starts again; how they are is asked of it, and kept nowhere.
"""
