"""Tables and charts of the page where ranks are chosen manually."""
