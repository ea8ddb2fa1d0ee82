"""Sections of the Manual allocation page."""
