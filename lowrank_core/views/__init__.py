"""Tidy tables and frozen records, from which the pages and ``lowrank_core.figures`` draw. Torch-free.

One module for each question: ``model``, ``headers`` and ``sources`` (what is looked at), ``text``, ``calibration``, ``spectrum``,
``search``, ``compare``, ``runs``; ``layermap`` is the shape that every layer x module map shares; ``formatting`` turns
numbers into words.
"""
