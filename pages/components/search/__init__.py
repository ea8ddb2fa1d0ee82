"""Sections of the Rank search page."""
