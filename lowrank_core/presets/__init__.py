"""Whole recipes under one name, and where each departs from its paper. Torch-free."""
