"""Tables and charts of the Spectra page."""
