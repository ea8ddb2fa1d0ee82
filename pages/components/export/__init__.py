"""Sections of the Export page."""
