"""Singular values of weights and eigenvalues of features, and the numbers drawn from them. Torch-free."""
