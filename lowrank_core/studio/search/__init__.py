"""Tables and charts of the Rank search page."""
