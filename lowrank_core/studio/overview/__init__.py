"""Tables and charts of the Overview page: model, text, runs."""
