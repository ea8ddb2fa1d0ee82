"""Tables and charts of the Manual allocation page."""
