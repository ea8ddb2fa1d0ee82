"""Sections of the page where ranks are chosen manually."""
