"""Replacements of linear layers: plain factors, pivoted ones, stacks, per-head factors, in floats, int8 or int4."""
