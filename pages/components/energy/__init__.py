"""Sections of the Feature energy page."""
