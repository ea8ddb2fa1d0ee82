"""Sensitivity of single modules: ΔKL against the kept ratio (Bolaco, arXiv 2405.10616, figures 1 and 5).

::

    config     what to measure                      planning    shapes -> cells with their ranks, the coarse ones first
    records    cells in a run's folder              measuring   cells -> KL divergence to the dense model (the only part with torch)
"""
