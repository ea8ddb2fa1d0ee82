"""Bayesian optimisation of how ranks are allocated. ``records`` is torch-free; the rest runs in the worker."""
