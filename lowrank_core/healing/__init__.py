"""Training what a compression left: a few minutes on text win back a part of what one shot lost, at the same size.

``config`` and ``records`` know no torch; ``trainer.heal`` does the work.
"""
