"""What the top directions of a module's features mean.

``config`` and ``records`` know no torch; ``measuring.top_directions`` does the work.
"""
