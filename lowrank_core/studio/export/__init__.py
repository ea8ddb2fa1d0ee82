"""Tables of the Export page."""
