"""Tables and charts of the Sensitivity page."""
