"""Shared parts of the pages: navigation, state, layout, charts, forms."""
