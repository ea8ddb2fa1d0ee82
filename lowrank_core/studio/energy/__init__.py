"""Tables and charts of the Feature energy page."""
