"""Tables and charts of the Compare page."""
