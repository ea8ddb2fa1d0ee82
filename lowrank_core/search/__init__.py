"""Bayesian optimisation of rank allocations, in the worker."""
