"""Sections of the Sensitivity page."""
