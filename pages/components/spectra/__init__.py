"""Sections of the Spectra page."""
